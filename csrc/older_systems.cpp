// What gcc and glibc would otherwise take from versions of themselves that are newer than torch asks for: with these
// two, a module that was built on a new system loads on every system that torch's own wheels load on (manylinux_2_28).
#include <cmath>
#include <new>

// glibc 2.29 gave exp a second version, which leaves out the reports of errors in the style of System V; the numbers
// are the same. The linker sends every call of exp here (--wrap).
#if defined(__x86_64__) && defined(__GLIBC__)
extern "C" double older_exp(double x);
__asm__(".symver older_exp, exp@GLIBC_2.2.5");
extern "C" double __wrap_exp(double x) { return older_exp(x); }
#else
extern "C" double __real_exp(double x);
extern "C" double __wrap_exp(double x) { return __real_exp(x); }
#endif

// The containers' answer to an impossible size is in libstdc++ only from gcc 11 on.
#if defined(__GLIBCXX__)
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif
