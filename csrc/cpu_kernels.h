// The inner loops of the CPU backend. cpu.cpp includes this file once for each instruction set, each time inside another
// namespace, with LANES (floats in a vector) and, on x86, the level of the intrinsics set. So one binary is fast everywhere.
// There is no include guard on purpose.

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

static inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// Intrinsics, because GCC makes twice as many instructions from __builtin_convertvector.
static inline Floats load(const BFloat16* from) {
#if LANES == 16
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif LANES == 8
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
#endif
}

static inline Floats load(const Float16* from) {
#if LANES == 16
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif LANES == 8
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  Floats x;
  for (int i = 0; i < LANES; i++) x[i] = widen(from[i]);
  return x;
#endif
}

static inline Halves narrow(Floats x, BFloat16) {  // round to nearest even; NaN stays NaN
  Words bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words nan = (Words)(x != x);
  const Words chosen = (rounded & ~nan) | (nan & 0x7fc0);
#if LANES == 16
  return (Halves)_mm512_cvtepi32_epi16((__m512i)chosen);
#elif LANES == 8
  const __m256i packed = _mm256_packus_epi32((__m256i)chosen, (__m256i)chosen);  // within each half
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(chosen, Halves);
#endif
}

static inline Halves narrow(Floats x, Float16) {
  Halves bits;
#if LANES == 16
  const __m256i half = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(&bits, &half, sizeof bits);
#elif LANES == 8
  const __m128i half = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(&bits, &half, sizeof bits);
#else
  for (int i = 0; i < LANES; i++) bits[i] = narrow(x[i], Float16{}).bits;
#endif
  return bits;
}

// `stream`: write past the caches, for a gradient that is read only after they have been filled with other data. Needs alignment.
template <bool stream, class Vector>
static inline void store_bits(void* to, Vector x) {
#ifdef __x86_64__
  if constexpr (stream) {
#if LANES == 16
    if constexpr (sizeof x == 64) return _mm512_stream_si512((__m512i*)to, (__m512i)x);
#endif
#if LANES >= 8
    if constexpr (sizeof x == 32) return _mm256_stream_si256((__m256i*)to, (__m256i)x);
#endif
    if constexpr (sizeof x == 16) return _mm_stream_si128((__m128i*)to, (__m128i)x);
  }
#endif
  std::memcpy(to, &x, sizeof x);
}

template <bool stream>
static inline void store(float* to, Floats x) { store_bits<stream>(to, x); }
template <bool stream, class Half>
static inline void store(Half* to, Floats x) { store_bits<stream>(to, narrow(x, Half{})); }

// The three sums over a sample. Where R is Scored, the reference's errors are known already, and its sums are 0.
template <class P, class R, class T>
static Sums sums(const void* policy, const void* reference, const void* target, int64_t count) {
  // fp32 within a block, fp64 between blocks: a lane adds 16 numbers in fp32, then goes on in fp64.
  constexpr int kBlock = 32 * LANES;
  constexpr bool predicted = !std::is_same_v<R, Scored>;
  const P* p = (const P*)policy;
  const R* r = (const R*)reference;
  const T* t = (const T*)target;
  Doubles difference = {}, model = {}, ref = {};
  const int64_t whole = count - count % LANES;
  for (int64_t start = 0; start < whole; start += kBlock) {
    const int64_t end = start + kBlock < whole ? start + kBlock : whole;
    Floats d0 = {}, m0 = {}, r0 = {}, d1 = {}, m1 = {}, r1 = {};
    int64_t i = start;
    for (; i + 2 * LANES <= end; i += 2 * LANES) {
      const Floats a = load(p + i), c = load(t + i), x = load(p + i + LANES), z = load(t + i + LANES);
      const Floats ac = a - c, xz = x - z;
      m0 += ac * ac;
      m1 += xz * xz;
      if constexpr (predicted) {
        const Floats b = load(r + i), y = load(r + i + LANES), bc = b - c, yz = y - z;
        d0 += (a - b) * (ac + bc);
        d1 += (x - y) * (xz + yz);
        r0 += bc * bc;
        r1 += yz * yz;
      }
    }
    for (; i < end; i += LANES) {
      const Floats a = load(p + i), c = load(t + i), ac = a - c;
      m0 += ac * ac;
      if constexpr (predicted) {
        const Floats b = load(r + i), bc = b - c;
        d0 += (a - b) * (ac + bc);
        r0 += bc * bc;
      }
    }
    difference += __builtin_convertvector(d0 + d1, Doubles);
    model += __builtin_convertvector(m0 + m1, Doubles);
    ref += __builtin_convertvector(r0 + r1, Doubles);
  }
  Sums sum = {};
  for (int i = 0; i < LANES; i++) {
    sum.difference += difference[i];
    sum.model += model[i];
    sum.reference += ref[i];
  }
  for (int64_t i = whole; i < count; i++) {
    const float a = widen(p[i]), c = widen(t[i]), ac = a - c;
    sum.model += (double)(ac * ac);
    if constexpr (predicted) {
      const float b = widen(r[i]), bc = b - c;
      sum.difference += (double)((a - b) * (ac + bc));
      sum.reference += (double)(bc * bc);
    }
  }
  return sum;
}

template <bool stream, class P, class T>
static void gradient_as(P* grad, const P* p, const T* t, int64_t count, float coefficient, const Ahead& ahead) {
  int64_t i = 0;
  if constexpr (stream) {
    const int64_t head = (-(intptr_t)grad & (sizeof(P) * LANES - 1)) / sizeof(P);
    for (; i < head && i < count; i++) narrow_to(grad + i, coefficient * (widen(p[i]) - widen(t[i])));
  }
  if (ahead.bytes[0]) {
    for (; i + 64 <= count; i += 64) {
      for (int k = 0; k < 3; k++) {  // 64 elements are `bytes` cache lines
        for (int64_t line = 0; line < ahead.bytes[k]; line++) {
          __builtin_prefetch(ahead.from[k] + i * ahead.bytes[k] + 64 * line, 0, 2);
        }
      }
      for (int64_t j = i; j < i + 64; j += LANES) store<stream>(grad + j, coefficient * (load(p + j) - load(t + j)));
    }
  }
  for (; i + LANES <= count; i += LANES) store<stream>(grad + i, coefficient * (load(p + i) - load(t + i)));
  for (; i < count; i++) narrow_to(grad + i, coefficient * (widen(p[i]) - widen(t[i])));
}

template <class P, class T>
static void gradient(void* grad, const void* policy, const void* target, int64_t count, float coefficient, bool stream,
                     const Ahead& ahead) {
  if (stream) {
    gradient_as<true>((P*)grad, (const P*)policy, (const T*)target, count, coefficient, ahead);
  } else {
    gradient_as<false>((P*)grad, (const P*)policy, (const T*)target, count, coefficient, ahead);
  }
}

template <bool stream, class P>
static void rescale_as(P* to, const P* from, int64_t count, float factor) {
  int64_t i = 0;
  if constexpr (stream) {
    const int64_t head = (-(intptr_t)to & (sizeof(P) * LANES - 1)) / sizeof(P);
    for (; i < head && i < count; i++) narrow_to(to + i, factor * widen(from[i]));
  }
  for (; i + LANES <= count; i += LANES) store<stream>(to + i, factor * load(from + i));
  for (; i < count; i++) narrow_to(to + i, factor * widen(from[i]));
}

template <class P>
static void rescale(void* to, const void* from, int64_t count, float factor, bool stream) {
  if (stream) {
    rescale_as<true>((P*)to, (const P*)from, count, factor);
  } else {
    rescale_as<false>((P*)to, (const P*)from, count, factor);
  }
}

// The functions for a combination of dtypes; the numbers are cpu.cpp's kFloat, kHalf, kBFloat, kScored.
template <class P, class R>
static Kernels kernels_for(int t) {
  if (t == kFloat) return {sums<P, R, float>, gradient<P, float>, rescale<P>};
  if (t == kHalf) return {sums<P, R, Float16>, gradient<P, Float16>, rescale<P>};
  return {sums<P, R, BFloat16>, gradient<P, BFloat16>, rescale<P>};
}

template <class P>
static Kernels kernels_for(int r, int t) {
  if (r == kScored) return kernels_for<P, Scored>(t);
  return r == kFloat ? kernels_for<P, float>(t) : r == kHalf ? kernels_for<P, Float16>(t) : kernels_for<P, BFloat16>(t);
}

Kernels kernels_for(int p, int r, int t) {
  return p == kFloat ? kernels_for<float>(r, t) : p == kHalf ? kernels_for<Float16>(r, t) : kernels_for<BFloat16>(r, t);
}
