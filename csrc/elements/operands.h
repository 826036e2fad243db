// The operands of elementwise: elements of any storage type and strides, as runs of the compute type.
//
// Layout: a tensor over the call's sizes, the innermost dimension first, with strides in elements; a stride of 0
// broadcasts. Elements are taken in chunks that fit the first cache.
//
// Precision policy: reading widens exactly (integers are labels, 0 and 1); writing rounds once, to the nearest.
//
// Steps: 1. begin() looks at an operand: one element for all, in place, or to be copied. 2. fetch() gives a chunk of
// it. 3. write puts a chunk of results where the output has its elements.
#pragma once

#include "elements/elementwise.h"
#include "parallel.h"
#include "simd/load_store.h"

namespace logitless::LL_ISA {
namespace {  // local to the kernel that includes this, as the kernel itself is

template <class Real> inline constexpr int64_t kChunk = 4096 / sizeof(Real);  // elements computed from and to L1

template <class Real, class T> LL_INLINE Real to_compute(T x) {
  if constexpr (__is_class(T))
    return static_cast<Real>(widen(x));  // half precision
  else
    return static_cast<Real>(x);
}

// n elements of one stride into `out`.
template <class Real, class T> void read_run(const void* data, int64_t offset, int64_t stride, int64_t n, Real* out) {
  const T* p = static_cast<const T*>(data) + offset;
  if constexpr (__is_class(T) && sizeof(Real) == 4) {
    if (stride == 1) {
      int64_t i = 0;
      for (; i + kLanes<float> <= n; i += kLanes<float>) store(out + i, load(p + i));
      if (i < n) store_partial(out + i, load_partial(p + i, n - i, 0.0f), n - i);
      return;
    }
  }
  if (stride == 0) {
    const Real same = to_compute<Real>(*p);
    for (int64_t i = 0; i < n; ++i) out[i] = same;
  } else if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_compute<Real>(p[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = to_compute<Real>(p[i * stride]);
  }
}
template <class Real> void read(const Operand& from, int64_t offset, int64_t stride, int64_t n, Real* out) {
  switch (from.storage) {
    case Storage::kFloat32: return read_run<Real, float>(from.data, offset, stride, n, out);
    case Storage::kBFloat16: return read_run<Real, BFloat16>(from.data, offset, stride, n, out);
    case Storage::kFloat16: return read_run<Real, Float16>(from.data, offset, stride, n, out);
    case Storage::kFloat64: return read_run<Real, double>(from.data, offset, stride, n, out);
    case Storage::kInt64: return read_run<Real, int64_t>(from.data, offset, stride, n, out);
    case Storage::kInt32: return read_run<Real, int32_t>(from.data, offset, stride, n, out);
    case Storage::kInt16: return read_run<Real, int16_t>(from.data, offset, stride, n, out);
    case Storage::kInt8: return read_run<Real, int8_t>(from.data, offset, stride, n, out);
    case Storage::kUInt8: return read_run<Real, uint8_t>(from.data, offset, stride, n, out);
  }
}

// n elements from `from` on with one stride. `streaming`: past the caches where the stride is 1.
template <class T, class Real>
void write_run(void* data, int64_t offset, int64_t stride, int64_t n, const Real* from, bool streaming) {
  T* p = static_cast<T*>(data) + offset;
  if constexpr (__is_same(Compute<T>, Real)) {
    if (stride == 1) {
      constexpr int64_t L = kLanes<Real>, kAlign = L * static_cast<int64_t>(sizeof(T));
      int64_t i = 0;
      if (streaming) {
        const int64_t beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)) % kAlign;
        const int64_t head = (kAlign - beyond) % kAlign / static_cast<int64_t>(sizeof(T));
        if (head && head <= n) {
          store_partial(p, load_partial(from, head, Real(0)), head);
          i = head;
        }
        if (reinterpret_cast<uintptr_t>(p + i) % kAlign == 0)
          for (; i + L <= n; i += L) stream(p + i, load(from + i));
      }
      for (; i + L <= n; i += L) store(p + i, load(from + i));
      if (i < n) store_partial(p + i, load_partial(from + i, n - i, Real(0)), n - i);
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) p[i * stride] = narrow<T>(static_cast<double>(from[i]));
}
template <class Real>
void write(const Operand& to, int64_t offset, int64_t stride, int64_t n, const Real* from, bool streaming) {
  switch (to.storage) {
    case Storage::kFloat32: return write_run<float>(to.data, offset, stride, n, from, streaming);
    case Storage::kBFloat16: return write_run<BFloat16>(to.data, offset, stride, n, from, streaming);
    case Storage::kFloat16: return write_run<Float16>(to.data, offset, stride, n, from, streaming);
    case Storage::kFloat64: return write_run<double>(to.data, offset, stride, n, from, streaming);
    default: return;  // the module takes floating outputs only
  }
}

// A chunk of consecutive elements, in the order of the call's sizes.
struct Place {
  int64_t begin;
  int64_t count;
  int64_t at[kMaxDims];  // the coordinates of `begin`, the innermost first
};

// Calls run(offset, stride, first, n) for each stretch of the chunk that the operand reaches with one stride.
template <class F>
LL_INLINE void stretches(const ElementwiseArgs& a, const Operand& o, bool dense, const Place& place, const F& run) {
  if (dense) return run(place.begin, int64_t{1}, int64_t{0}, place.count);
  int64_t at[kMaxDims];
  int64_t offset = 0;
  for (int d = 0; d < a.dims; ++d) {
    at[d] = place.at[d];
    offset += at[d] * o.strides[d];
  }
  for (int64_t done = 0; done < place.count;) {
    const int64_t n = smaller(a.sizes[0] - at[0], place.count - done);
    run(offset, o.strides[0], done, n);
    done += n;
    if (done == place.count) return;
    // To the beginning of the next run of the innermost dimension, with carries into the outer ones.
    offset -= at[0] * o.strides[0];
    at[0] = 0;
    for (int d = 1; d < a.dims; ++d) {
      offset += o.strides[d];
      if (++at[d] < a.sizes[d]) break;
      offset -= a.sizes[d] * o.strides[d];
      at[d] = 0;
    }
  }
}

// Whether the operand's elements follow each other in memory in the order of the call's sizes.
inline bool is_dense(const ElementwiseArgs& a, const Operand& o) {
  int64_t expected = 1;
  for (int d = 0; d < a.dims; ++d) {
    if (o.strides[d] != expected) return false;
    expected *= a.sizes[d];
  }
  return true;
}

// An operand's elements of the current chunk, in place where they lie there in the compute type, or in a buffer.
template <class Real> struct Source {
  const Operand* operand;
  bool dense, same, in_place;
  Real scale;  // still to be multiplied with what fetch() gives
  alignas(LL_BYTES) Real buffer[kChunk<Real>];

  // `absent` is the value of an operand that is not given.
  void begin(const ElementwiseArgs& a, const Operand& o, Real absent, double factor = 1.0) {
    operand = &o;
    scale = static_cast<Real>(factor);
    same = true;
    for (int d = 0; d < a.dims && o.data; ++d) same = same && o.strides[d] == 0;
    dense = !same && is_dense(a, o);
    in_place = o.storage == (sizeof(Real) == 4 ? Storage::kFloat32 : Storage::kFloat64);
    if (!same) return;
    Real all = absent;
    if (o.data) read<Real>(o, 0, 0, 1, &all);
    all = static_cast<Real>(all * factor);
    scale = Real(1);
    for (int64_t i = 0; i < kChunk<Real>; ++i) buffer[i] = all;
  }
  // The chunk's elements.
  const Real* fetch(const ElementwiseArgs& a, const Place& place) {
    if (same) return buffer;
    if (in_place && (dense || (operand->strides[0] == 1 && place.at[0] + place.count <= a.sizes[0]))) {
      int64_t offset = place.begin;
      if (!dense) {
        offset = 0;
        for (int d = 0; d < a.dims; ++d) offset += place.at[d] * operand->strides[d];
      }
      return static_cast<const Real*>(operand->data) + offset;
    }
    stretches(a, *operand, dense, place, [&](int64_t offset, int64_t stride, int64_t first, int64_t n) {
      read<Real>(*operand, offset, stride, n, buffer + first);
    });
    return buffer;
  }
};

}  // namespace
}  // namespace logitless::LL_ISA
