// Portable vectors from the compiler's vector extensions: one source for AVX-512, AVX2, SSE2 and NEON.
// Every function is a template over V, which is a vector of lanes or a plain float / double (the tails).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX__)
#include <immintrin.h>
#endif

// Before a loop of a known, small count over what lies in registers: it is unrolled whole.
#define FASTODE_UNROLL _Pragma("GCC unroll 64")

// Whether this build has convolutions in bfloat16, and whether on AMX tiles or by AVX-512's dot products; without them
// nothing that stores maps in bfloat16 is compiled.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define FASTODE_TILES 1
#else
#define FASTODE_TILES 0
#endif
#if FASTODE_TILES && ((defined(__AMX_BF16__) && defined(__AMX_TILE__)) || defined(FASTODE_EMULATED_TILES))
#define FASTODE_AMX 1
#else
#define FASTODE_AMX 0
#endif

namespace fastode {

inline constexpr bool kTiles = FASTODE_TILES;

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class A, int bytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(bytes)));
};

// The native vector of A (float or double), and its number of lanes.
template <class A>
using Vec = typename VectorOf<A, kVectorBytes>::type;
template <class A>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class V>
struct Lane {
  using Scalar = decltype(V{}[0] + 0);
  static constexpr int count = sizeof(V) / sizeof(Scalar);
  using Int = typename VectorOf<std::conditional_t<sizeof(Scalar) == 4, int32_t, int64_t>, sizeof(V)>::type;
};
template <>
struct Lane<float> {
  using Scalar = float;
  static constexpr int count = 1;
  using Int = int32_t;
};
template <>
struct Lane<double> {
  using Scalar = double;
  static constexpr int count = 1;
  using Int = int64_t;
};

template <class V>
using ScalarOf = typename Lane<V>::Scalar;

template <class V>
inline V load(const ScalarOf<V>* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
inline void store(ScalarOf<V>* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

template <class V>
inline V splat(ScalarOf<V> value) {
  return value - V{};  // minus, so that -0 stays -0
}

// Keeps what several products use in a register. With sixteen of them, gcc reads it from memory at each use instead,
// which takes longer than the products.
template <class V>
inline V in_register(V value) {
#if defined(__x86_64__) && !defined(__AVX512F__)
  asm volatile("" : "+x"(value));
#endif
  return value;
}
// The same place, of which gcc does not know that: what is read there a second time is not kept in a register till
// then.
template <class T>
inline const T* unshared(const T* from) {
#if defined(__x86_64__) && !defined(__AVX512F__)
  asm volatile("" : "+r"(from));
#endif
  return from;
}

template <class V>
inline V absolute(V x) {
  return x < 0 ? -x : x;
}

// Whether no lane is infinite or NaN.
template <class V>
inline bool all_finite(V x) {
  const V zero = x - x;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && Lane<V>::count == 16)
    return _mm512_cmp_ps_mask((__m512)zero, (__m512)zero, _CMP_UNORD_Q) == 0;
#elif defined(__AVX__)
  if constexpr (sizeof(V) == 32 && Lane<V>::count == 8)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)zero, (__m256)zero, _CMP_UNORD_Q)) == 0;
#endif
  bool finite = true;
  for (int lane = 0; lane < Lane<V>::count; ++lane) finite = finite && zero[lane] == 0;
  return finite;
}

namespace detail {

template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round =
      12582912.0f;                         // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
  static constexpr float lowest = -87.0f;  // below, the result is no longer a normal number: zero
  static constexpr int mantissa = 23, degree = 7, log_terms = 10;
  static constexpr int32_t one = 0x3f800000;
};
template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.4426950408889634, ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -708.0;
  static constexpr int mantissa = 52, degree = 13, log_terms = 18;
  static constexpr int64_t one = 0x3ff0000000000000;
};

constexpr double inverse_factorial(int k) { return k > 1 ? inverse_factorial(k - 1) / k : 1; }

// Splits exp(x) = s (1 + q), s a power of two, for lowest <= x <= 0.
template <class V>
inline void split_exp(V x, V& s, V& q) {
  using A = ScalarOf<V>;
  using K = ExpConstants<A>;
  using I = typename Lane<V>::Int;
  const V shifted = x * K::log2e + K::round;
  const V n = shifted - K::round;
  const V r = (x - n * K::ln2_high) - n * K::ln2_low;
  I bits;
  std::memcpy(&bits, &shifted, sizeof(V));
  bits = (bits << K::mantissa) + K::one;
  std::memcpy(&s, &bits, sizeof(V));
  // Taylor series of exp(r) - 1 on |r| <= ln(2) / 2, which is below rounding at these degrees.
  V series = splat<V>(A(inverse_factorial(K::degree)));
  for (int k = K::degree - 1; k >= 2; --k) series = series * r + A(inverse_factorial(k));
  q = (series * r + A(1)) * r;
}

}  // namespace detail

// exp(x) for x <= 0.
template <class V>
inline V exp_nonpositive(V x) {
  constexpr auto lowest = detail::ExpConstants<ScalarOf<V>>::lowest;
  V s, q;
  detail::split_exp<V>(x < lowest ? splat<V>(lowest) : x, s, q);
  return x < lowest ? V{} : s * q + s;
}

// exp(x) - 1 for x <= 0, without cancellation near 0.
template <class V>
inline V expm1_nonpositive(V x) {
  constexpr auto lowest = detail::ExpConstants<ScalarOf<V>>::lowest;
  V s, q;
  detail::split_exp<V>(x < lowest ? splat<V>(lowest) : x, s, q);
  return s * q + (s - 1);
}

// log(1 + u) for 0 <= u <= 1, by 2 artanh(u / (2 + u)).
template <class V>
inline V log1p_unit(V u) {
  using A = ScalarOf<V>;
  const V s = u / (u + A(2)), s2 = s * s;
  constexpr int terms = detail::ExpConstants<A>::log_terms;
  V series = splat<V>(A(1) / A(2 * terms - 1));
  for (int k = terms - 2; k >= 0; --k) series = series * s2 + A(1) / A(2 * k + 1);
  return A(2) * s * series;
}

template <class V>
inline V tanh(V x) {
  const V t = expm1_nonpositive<V>(ScalarOf<V>(-2) * absolute(x));
  const V magnitude = -t / (t + ScalarOf<V>(2));
  return x < 0 ? -magnitude : magnitude;
}

// 1 / (1 + exp(-x)), both tails without overflow.
template <class V>
inline V sigmoid(V x) {
  const V e = exp_nonpositive<V>(-absolute(x));
  return (x < 0 ? e : splat<V>(1)) / (e + ScalarOf<V>(1));
}

namespace detail {

// exp(t^2 / 2) erfc(t / sqrt(2)) / 2 as a polynomial in (t - 4) / (t + 4), the highest power first: interpolated at
// Chebyshev nodes, so that times exp(-t^2 / 2) it is off by less than rounding, for all t >= 0.
template <class A>
inline constexpr A kTail[] = {A(9.831800075e-5),  A(0.001076587443), A(0.0008139148253),
                              A(-0.008397437492), A(0.03086858943),  A(-0.07171114154),
                              A(0.1243788533),    A(-0.1703976878),  A(0.09441064314)};
template <>
inline constexpr double kTail<double>[] = {
    -8.7251927379505411029e-9, -5.0326564515092377723e-8, -6.1819888565934229544e-8, 2.3913233905654244015e-7,
    6.6945476914153436241e-7,  -8.3789533298053769277e-7, -4.3096350660052782454e-6, 4.6314479402623563614e-6,
    2.8649394347323551027e-5,  -4.5554668168086607011e-5, -1.8718434586775893707e-4, 6.3881382479709495652e-4,
    5.0756207734598859029e-4,  -8.4920954808124616373e-3, 3.0864804106300814063e-2,  -7.1707407337762642457e-2,
    1.2437925533926330437e-1,  -1.7039772154845528041e-1, 9.4410641301968936699e-2};

}  // namespace detail

// The normal distribution: P(X <= x), and exp(-x^2 / 2). For NaN neither need be NaN.
template <class V>
inline V normal_distribution(V x, V& bell) {
  using A = ScalarOf<V>;
  const V size = absolute(x), t = size < 40 ? size : splat<V>(40);  // where the bell is zero
  const V y = (t - A(4)) / (t + A(4));
  V tail{};
  for (const A coefficient : detail::kTail<A>) tail = tail * y + coefficient;
  bell = exp_nonpositive<V>(A(-0.5) * t * t);
  tail *= bell;
  return x < 0 ? tail : A(1) - tail;
}

// bfloat16 is storage only: read as float32, written with round to nearest even.
struct bfloat16 {
  uint16_t bits;
};

inline float widen(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline bfloat16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

// The accumulator of a storage type.
template <class T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<bfloat16> {
  using type = float;
};
template <class T>
using Number = typename AccumulatorOf<T>::type;

// As many stored numbers as fill a vector of what is computed with.
template <class T>
inline Vec<Number<T>> load_stored(const T* from) {
  if constexpr (std::is_same_v<T, bfloat16>) {
#if defined(__AVX512BW__)
    // One shuffle that puts each number above 16 zeros; what the compiler makes of the lines below takes five.
    const __m512i bits = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    const __m512i places = _mm512_set_epi32(0xf0000, 0xe0000, 0xd0000, 0xc0000, 0xb0000, 0xa0000, 0x90000, 0x80000,
                                            0x70000, 0x60000, 0x50000, 0x40000, 0x30000, 0x20000, 0x10000, 0);
    return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, bits);
#else
    typename VectorOf<uint16_t, kVectorBytes / 2>::type bits;
    std::memcpy(&bits, from, sizeof(bits));
    return (Vec<float>)(__builtin_convertvector(bits, VectorOf<uint32_t, kVectorBytes>::type) << 16);
#endif
  } else {
    return load<Vec<T>>(from);
  }
}

template <class T>
inline void store_stored(T* to, Vec<Number<T>> value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
#if defined(__AVX512BF16__)
    const auto rounded = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy(to, &rounded, sizeof(rounded));
#else
    for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = narrow(value[lane]);
#endif
  } else {
    store(to, value);
  }
}

}  // namespace fastode
