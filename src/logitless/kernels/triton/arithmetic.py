"""Functions of numbers that the kernels share, within a few units in the last place on every device.

A GPU's own `exp` and `log` of float32 are approximations whose relative error grows with the argument (`exp`) or near 1
(`log`), and Triton has no `expm1` and `log1p` that run everywhere. So they are made here of `exp2` near 0 and of short
polynomials. Float64 takes the device's functions, which are exact to an ulp or two.
"""

import triton
import triton.language as tl


@triton.jit
def difference(a, b):
    """Return a - b rounded, and what the rounding lost (Knuth's TwoSum); 0 of differences that are infinite."""
    rounded = a - b
    back = rounded - a
    lost = (a - (rounded - back)) - (b + back)
    return rounded, tl.where(lost == lost, lost, 0.0)


@triton.jit
def exp(x, low, FINE: tl.constexpr):
    """Return exp(x + low) for x below 80 and a tiny `low`; 0 below the normal numbers.

    FINE: exp(x) = 2^n exp(r), n the whole number nearest x / ln2. `x / ln2 + 1.5 * 2^23` holds n in its last bits, n
    times the first part of ln2 is exact, and 2^n is added to the exponent of exp(r). Else exp2(x / ln2), whose relative
    error is |x| 2^-24: enough for logits of 16 bits.
    """
    if x.dtype == tl.float64:
        return tl.exp(x + low)
    elif FINE:
        held = tl.where(x < -87.0, -87.0, x)
        shifted = held * 1.4426950408889634 + 12582912.0
        n = shifted - 12582912.0
        r = ((held - n * 0.693359375) + n * 2.12194440054690583e-4) + low
        near = tl.exp2(r * 1.4426950408889634)
        power = shifted.to(tl.int32, bitcast=True) << 23
        scaled = (near.to(tl.int32, bitcast=True) + power).to(tl.float32, bitcast=True)
        # NaN fails every comparison, and must not have its bits moved.
        return tl.where(x >= -87.0, scaled, tl.where(x < -87.0, 0.0, x))
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def atanh_tail(z):
    """Return (atanh(s) - s) / s^3 with z = s^2 <= 1/9: 1/3 + z/5 + z^2/7 + ..."""
    if z.dtype == tl.float64:
        sum = z * (1.0 / 39) + 1.0 / 37
        for k in tl.static_range(17):
            sum = sum * z + 1.0 / (35 - 2 * k)
        return sum
    else:
        sum = z * (1.0 / 17) + 1.0 / 15
        for k in tl.static_range(6):
            sum = sum * z + 1.0 / (13 - 2 * k)
        return sum


@triton.jit
def log1p_near(x):
    """Return log(1 + x) for x from -1/2 to 1, as 2 atanh(s) with s = x / (2 + x)."""
    s = x / (2.0 + x)
    z = s * s
    return s * (2.0 + 2.0 * z * atanh_tail(z))


@triton.jit
def log(x):
    """Return log(x), near 1 by way of x - 1, which is exact there."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        near = (x > 0.5) & (x < 2.0)
        return tl.where(near, log1p_near(tl.where(near, x - 1.0, 0.0)), tl.log(x))


@triton.jit
def log1p_wide(x):
    """Return log(1 + x) of a float64 x >= 0: log(u) x / (u - 1) with u = 1 + x, in which roundings cancel."""
    u = 1.0 + x
    moved = u - 1.0
    # x itself where it is nothing beside 1; infinite where it is.
    return tl.where(moved == 0, x, tl.where(moved == float("inf"), x, tl.log(u) * (x / moved)))


@triton.jit
def expm1_wide(x):
    """Return exp(x) - 1 of a float64 x, in the same way."""
    u = tl.exp(x)
    moved = u - 1.0
    logarithm = tl.log(u)
    plain = (x < -1.0) | (x > 1.0)
    return tl.where(moved == 0, x, tl.where(plain, moved, moved * (x / logarithm)))


@triton.jit
def exp_beyond_line(d):
    """Return exp(d) - 1 - d for |d| <= 1: its series, in which nothing cancels."""
    if d.dtype == tl.float64:
        sum = d * (1.0 / 20) + 1.0
        for k in tl.static_range(17):
            sum = sum * (d * (1.0 / (19 - k))) + 1.0
        return 0.5 * d * d * sum
    else:
        sum = d * (1.0 / 12) + 1.0
        for k in tl.static_range(9):
            sum = sum * (d * (1.0 / (11 - k))) + 1.0
        return 0.5 * d * d * sum


@triton.jit
def rounded(value, ptr):
    """Return a value in the dtype of what a pointer points to; half precisions are made of float32."""
    if ptr.dtype.element_ty == tl.float64:
        return value.to(tl.float64)
    else:
        return value.to(tl.float32).to(ptr.dtype.element_ty)


@triton.jit
def times(coefficient, value):
    """Return coefficient * value, where a coefficient of 0 wins over an infinite value."""
    excluded = (coefficient == 0) & ((value == float("inf")) | (value == float("-inf")))
    return tl.where(excluded, 0.0, coefficient * value)
