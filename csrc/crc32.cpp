#include "crc32.h"

#include <array>
#include <cstring>

#include "streaming_copy.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define ASYNCCKPT_HAVE_CLMUL 1
#endif

namespace asyncckpt {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320u;

// Slicing-by-8: table[k][b] is the CRC of byte b followed by k zero bytes.
using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) ? (crc >> 1) ^ kPolynomial : crc >> 1;
    tables[0][byte] = crc;
  }
  for (uint32_t byte = 0; byte < 256; ++byte)
    for (size_t k = 1; k < 8; ++k)
      tables[k][byte] = (tables[k - 1][byte] >> 8) ^ tables[0][tables[k - 1][byte] & 0xFF];
  return tables;
}

constexpr Tables kTables = make_tables();

// `state` is the inverted CRC, as everywhere below.
uint32_t update_table(uint32_t state, const uint8_t* data, size_t nbytes) {
  while (nbytes >= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    word ^= state;
    state = kTables[7][word & 0xFF] ^ kTables[6][(word >> 8) & 0xFF] ^
            kTables[5][(word >> 16) & 0xFF] ^ kTables[4][(word >> 24) & 0xFF] ^
            kTables[3][(word >> 32) & 0xFF] ^ kTables[2][(word >> 40) & 0xFF] ^
            kTables[1][(word >> 48) & 0xFF] ^ kTables[0][word >> 56];
    data += 8;
    nbytes -= 8;
  }
  while (nbytes--) state = (state >> 8) ^ kTables[0][(state ^ *data++) & 0xFF];
  return state;
}

// Product of two polynomials mod P; bit 31 is x^0 in this reflected form.
constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = (b & 1) ? (b >> 1) ^ kPolynomial : b >> 1;
  }
  return product;
}

// powers[k] = x^(2^k) mod P.
constexpr std::array<uint32_t, 64> make_powers() {
  std::array<uint32_t, 64> powers{};
  powers[0] = 1u << 30;  // x^1
  for (size_t k = 1; k < 64; ++k) powers[k] = multiply(powers[k - 1], powers[k - 1]);
  return powers;
}

constexpr std::array<uint32_t, 64> kPowers = make_powers();

// x^n mod P.
constexpr uint32_t power_of_x(uint64_t n) {
  uint32_t power = 1u << 31;  // x^0
  for (size_t k = 0; n != 0; n >>= 1, ++k)
    if (n & 1) power = multiply(kPowers[k], power);
  return power;
}

// Appending n bytes multiplies what came before by x^(8n).
template <typename Times>
constexpr uint32_t combine(Times times, uint32_t crc_a, uint32_t crc_b, uint64_t nbytes_b) {
  for (size_t k = 3; nbytes_b != 0; nbytes_b >>= 1, ++k)
    if (nbytes_b & 1) crc_a = times(kPowers[k % kPowers.size()], crc_a);
  return crc_a ^ crc_b;
}

static_assert(combine(multiply, 0x9BE3E0A3 /* "1234" */, 0x131DA070 /* "56789" */, 5) ==
              0xCBF43926);

// What a 64-bit half of a lane is multiplied with to move it: x^n mod P, shifted by one because the
// carry-less product of two reflected numbers comes out one bit short.
constexpr int64_t fold_constant(uint64_t n) { return static_cast<int64_t>(power_of_x(n)) << 1; }

#ifdef ASYNCCKPT_HAVE_CLMUL
// Folding with carry-less multiplication, after Gopal et al., "Fast CRC Computation for Generic
// Polynomials Using PCLMULQDQ Instruction" (Intel, 2009). A 128-bit lane is moved D bits ahead by
// multiplying its halves with x^(D+32) and x^(D-32) mod P; the paper's constants check ours.
static_assert(fold_constant(512 + 32) == 0x0154442bd4 && fold_constant(512 - 32) == 0x01c6e41596);
static_assert(fold_constant(128 + 32) == 0x01751997d0 && fold_constant(128 - 32) == 0x00ccaa009e);
static_assert(fold_constant(64) == 0x0163cd6124);

// A polynomial of 64 coefficients mod P (Barrett reduction).
__attribute__((target("pclmul,sse4.1"))) inline uint32_t remainder(__m128i polynomial) {
  const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  const __m128i low_words = _mm_setr_epi32(~0, 0, ~0, 0);
  __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(polynomial, low_words), barrett, 0x10);
  quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_words), barrett, 0x00);
  return static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(polynomial, quotient), 1));
}

__attribute__((target("pclmul,sse4.1"))) uint32_t multiply_clmul(uint32_t a, uint32_t b) {
  const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi32_si128(static_cast<int>(a)),
                                               _mm_cvtsi32_si128(static_cast<int>(b)), 0x00);
  return remainder(_mm_slli_epi64(product, 1));  // 63 coefficients: one bit short of 64
}

// Takes a multiple of 16 bytes, at least 16. With kCopies, here and below, what was taken is also at `to`, past
// the cache; that is a multiple of 64 then.
template <bool kCopies>
__attribute__((target("pclmul,sse4.1"))) uint32_t update_clmul(uint32_t state, const uint8_t* data,
                                                               size_t nbytes, uint8_t* to) {
  const __m128i fold_512 = _mm_set_epi64x(fold_constant(512 - 32), fold_constant(512 + 32));
  const __m128i fold_128 = _mm_set_epi64x(fold_constant(128 - 32), fold_constant(128 + 32));
  const __m128i fold_64 = _mm_set_epi64x(0, fold_constant(64));
  const __m128i low_words = _mm_setr_epi32(~0, 0, ~0, 0);

  const auto load = [&](size_t lane) __attribute__((target("pclmul,sse4.1"))) {
    const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + lane);
    if (kCopies) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + lane, loaded);
    return loaded;
  };
  const auto advance = [&](size_t taken_nbytes) {
    data += taken_nbytes;
    nbytes -= taken_nbytes;
    if (kCopies) to += taken_nbytes;
  };
  const auto fold = [](__m128i lane, __m128i by,
                       __m128i next) __attribute__((target("pclmul,sse4.1"))) {
    return _mm_xor_si128(
        _mm_xor_si128(_mm_clmulepi64_si128(lane, by, 0x00), _mm_clmulepi64_si128(lane, by, 0x11)),
        next);
  };

  __m128i a = _mm_xor_si128(load(0), _mm_cvtsi32_si128(static_cast<int>(state)));
  if (nbytes < 64) {
    advance(16);
  } else {
    __m128i b = load(1), c = load(2), d = load(3);
    advance(64);
    for (; nbytes >= 64; advance(64)) {
      a = fold(a, fold_512, load(0));
      b = fold(b, fold_512, load(1));
      c = fold(c, fold_512, load(2));
      d = fold(d, fold_512, load(3));
    }
    a = fold(a, fold_128, b);
    a = fold(a, fold_128, c);
    a = fold(a, fold_128, d);
  }
  for (; nbytes >= 16; advance(16)) a = fold(a, fold_128, load(0));

  // 128 bits -> 64 -> 32.
  a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, fold_128, 0x10));
  a = _mm_xor_si128(_mm_srli_si128(a, 4),
                    _mm_clmulepi64_si128(_mm_and_si128(a, low_words), fold_64, 0x00));
  return remainder(a);
}

// The same with four lanes in a register and four registers in flight: 256 bytes a round. What is
// left of the state goes on as the first 64 bytes of the narrower kernel would: lane by lane.
// Takes at least 512 bytes and returns how many it took; `lanes` is what they fold to.
#define ASYNCCKPT_WIDE __attribute__((target("avx512f,avx512vl,vpclmulqdq,pclmul,sse4.1")))

ASYNCCKPT_WIDE inline __m512i fold_wide(__m512i lanes, __m512i by, __m512i next) {
  constexpr int kXorOfThree = 0x96;
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(lanes, by, 0x00),
                                   _mm512_clmulepi64_epi128(lanes, by, 0x11), next, kXorOfThree);
}

ASYNCCKPT_WIDE inline __m512i in_every_lane(int64_t high, int64_t low) {
  return _mm512_set_epi64(high, low, high, low, high, low, high, low);
}

template <bool kCopies>
ASYNCCKPT_WIDE inline __m512i load_wide(const uint8_t* data, uint8_t* to, size_t index) {
  const __m512i loaded = _mm512_loadu_si512(data + 64 * index);
  if (kCopies) _mm512_stream_si512(reinterpret_cast<__m512i*>(to) + index, loaded);
  return loaded;
}

template <bool kCopies>
ASYNCCKPT_WIDE size_t update_wide(uint32_t state, const uint8_t* data, size_t nbytes,
                                  uint8_t lanes[64], uint8_t* to) {
  const __m512i fold_2048 = in_every_lane(fold_constant(2048 - 32), fold_constant(2048 + 32));
  const __m512i fold_512 = in_every_lane(fold_constant(512 - 32), fold_constant(512 + 32));
  const size_t taken_nbytes = nbytes & ~size_t{255};
  __m512i a = _mm512_xor_si512(load_wide<kCopies>(data, to, 0),
                               _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
  __m512i b = load_wide<kCopies>(data, to, 1), c = load_wide<kCopies>(data, to, 2),
          d = load_wide<kCopies>(data, to, 3);
  for (size_t done = 256; done < taken_nbytes; done += 256) {
    data += 256;
    if (kCopies) to += 256;
    a = fold_wide(a, fold_2048, load_wide<kCopies>(data, to, 0));
    b = fold_wide(b, fold_2048, load_wide<kCopies>(data, to, 1));
    c = fold_wide(c, fold_2048, load_wide<kCopies>(data, to, 2));
    d = fold_wide(d, fold_2048, load_wide<kCopies>(data, to, 3));
  }
  a = fold_wide(fold_wide(fold_wide(a, fold_512, b), fold_512, c), fold_512, d);
  _mm512_storeu_si512(lanes, a);
  return taken_nbytes;
}

// The same on processors without AVX-512: two lanes in a register, 128 bytes a round. Takes at least 128
// bytes.
#define ASYNCCKPT_DOUBLE __attribute__((target("avx2,vpclmulqdq,pclmul,sse4.1")))

ASYNCCKPT_DOUBLE inline __m256i fold_double(__m256i lanes, __m256i by, __m256i next) {
  return _mm256_xor_si256(_mm256_xor_si256(_mm256_clmulepi64_epi128(lanes, by, 0x00),
                                           _mm256_clmulepi64_epi128(lanes, by, 0x11)),
                          next);
}

template <bool kCopies>
ASYNCCKPT_DOUBLE inline __m256i load_double(const uint8_t* data, uint8_t* to, size_t index) {
  const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data) + index);
  if (kCopies) _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + index, loaded);
  return loaded;
}

template <bool kCopies>
ASYNCCKPT_DOUBLE size_t update_double(uint32_t state, const uint8_t* data, size_t nbytes,
                                      uint8_t lanes[64], uint8_t* to) {
  const __m256i fold_1024 = _mm256_set_epi64x(fold_constant(1024 - 32), fold_constant(1024 + 32),
                                              fold_constant(1024 - 32), fold_constant(1024 + 32));
  const __m256i fold_512 = _mm256_set_epi64x(fold_constant(512 - 32), fold_constant(512 + 32),
                                             fold_constant(512 - 32), fold_constant(512 + 32));
  const size_t taken_nbytes = nbytes & ~size_t{127};
  __m256i a = _mm256_xor_si256(load_double<kCopies>(data, to, 0),
                               _mm256_zextsi128_si256(_mm_cvtsi32_si128(static_cast<int>(state))));
  __m256i b = load_double<kCopies>(data, to, 1), c = load_double<kCopies>(data, to, 2),
          d = load_double<kCopies>(data, to, 3);
  for (size_t done = 128; done < taken_nbytes; done += 128) {
    data += 128;
    if (kCopies) to += 128;
    a = fold_double(a, fold_1024, load_double<kCopies>(data, to, 0));
    b = fold_double(b, fold_1024, load_double<kCopies>(data, to, 1));
    c = fold_double(c, fold_1024, load_double<kCopies>(data, to, 2));
    d = fold_double(d, fold_1024, load_double<kCopies>(data, to, 3));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), fold_double(a, fold_512, c));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes) + 1, fold_double(b, fold_512, d));
  return taken_nbytes;
}

bool has_wide() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("vpclmulqdq") &&
                          __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  return has;
}

bool has_double() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("vpclmulqdq") &&
                          __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  return has;
}

bool has_clmul() {
  static const bool has = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  return has;
}
#endif

}  // namespace

uint32_t crc32_portable(uint32_t crc, const void* data, size_t nbytes) {
  return ~update_table(~crc, static_cast<const uint8_t*>(data), nbytes);
}

uint32_t crc32(uint32_t crc, const void* data, size_t nbytes) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  uint32_t state = ~crc;
#ifdef ASYNCCKPT_HAVE_CLMUL
  if (nbytes >= 512 && (has_wide() || has_double())) {
    // The 64 bytes that stand for all that was taken are congruent to it mod P: a CRC state of zero
    // and then these bytes lead to the same state.
    uint8_t lanes[64];
    const auto update = has_wide() ? update_wide<false> : update_double<false>;
    const size_t taken_nbytes = update(state, bytes, nbytes, lanes, nullptr);
    state = update_clmul<false>(0, lanes, sizeof lanes, nullptr);
    bytes += taken_nbytes;
    nbytes -= taken_nbytes;
  }
  if (nbytes >= 16 && has_clmul()) {
    const size_t folded_nbytes = nbytes & ~size_t{15};
    state = update_clmul<false>(state, bytes, folded_nbytes, nullptr);
    bytes += folded_nbytes;
    nbytes -= folded_nbytes;
  }
#endif
  return ~update_table(state, bytes, nbytes);
}

uint32_t crc32_copy(uint32_t crc, void* to, const void* data, size_t nbytes) {
#ifdef ASYNCCKPT_HAVE_CLMUL
  if (nbytes >= kStreamedNbytesMin && has_clmul()) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    auto* target = static_cast<uint8_t*>(to);
    const auto advance = [&](size_t taken_nbytes) {
      bytes += taken_nbytes, target += taken_nbytes, nbytes -= taken_nbytes;
    };
    const auto copy_plainly = [&](size_t taken_nbytes) {
      std::memcpy(target, bytes, taken_nbytes);
      crc = crc32(crc, target, taken_nbytes);
      advance(taken_nbytes);
    };
    copy_plainly(-reinterpret_cast<uintptr_t>(to) % 64);
    if (has_wide() || has_double()) {
      uint8_t lanes[64];
      const auto update = has_wide() ? update_wide<true> : update_double<true>;
      const size_t taken_nbytes = update(~crc, bytes, nbytes, lanes, target);
      crc = ~update_clmul<false>(0, lanes, sizeof lanes, nullptr);
      advance(taken_nbytes);
    }
    if (nbytes >= 64) {
      const size_t folded_nbytes = nbytes & ~size_t{15};
      crc = ~update_clmul<true>(~crc, bytes, folded_nbytes, target);
      advance(folded_nbytes);
    }
    _mm_sfence();  // whoever is told that it is there sees all of it
    copy_plainly(nbytes);
    return crc;
  }
#endif
  std::memcpy(to, data, nbytes);
  return crc32(crc, to, nbytes);  // not of `data`: others may write to that meanwhile
}

uint32_t crc32_combine(uint32_t crc_a, uint32_t crc_b, uint64_t nbytes_b) {
  if (crc_a == 0) return crc_b;  // as of nothing
#ifdef ASYNCCKPT_HAVE_CLMUL
  if (has_clmul()) return combine(multiply_clmul, crc_a, crc_b, nbytes_b);
#endif
  return combine(multiply, crc_a, crc_b, nbytes_b);
}

bool crc32_goes_along() {
#ifdef ASYNCCKPT_HAVE_CLMUL
  return has_clmul();
#else
  return false;
#endif
}

const char* crc32_kernel() {
#ifdef ASYNCCKPT_HAVE_CLMUL
  if (has_wide()) return "clmul-512";
  if (has_double()) return "clmul-256";
  if (has_clmul()) return "clmul-128";
#endif
  return "table";
}

}  // namespace asyncckpt
