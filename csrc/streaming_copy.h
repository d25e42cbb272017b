// memcpy for bytes that nobody reads again soon: they go to memory past the cache.
//
// A plain store first fetches the line that it overwrites, which is a third of the traffic, and pushes
// out what the cache still holds of the next block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace asyncckpt {

// Shorter copies go through the cache: what lies before and behind whole lines, and the fence, cost more than
// is gained by not fetching what is overwritten.
constexpr size_t kStreamedNbytesMin = 4096;

inline void streaming_copy(void* target, const void* source, size_t nbytes) {
#if defined(__x86_64__)
  constexpr size_t kLine = 64;
  if (nbytes < kStreamedNbytesMin) {
    std::memcpy(target, source, nbytes);
    return;
  }
  auto* to = static_cast<char*>(target);
  const auto* from = static_cast<const char*>(source);
  const size_t head_nbytes = -reinterpret_cast<uintptr_t>(to) % kLine;
  std::memcpy(to, from, head_nbytes);
  to += head_nbytes, from += head_nbytes, nbytes -= head_nbytes;
  for (; nbytes >= kLine; to += kLine, from += kLine, nbytes -= kLine) {
    const auto* words = reinterpret_cast<const __m128i*>(from);
    const __m128i a = _mm_loadu_si128(words), b = _mm_loadu_si128(words + 1);
    const __m128i c = _mm_loadu_si128(words + 2), d = _mm_loadu_si128(words + 3);
    auto* line = reinterpret_cast<__m128i*>(to);
    _mm_stream_si128(line, a);
    _mm_stream_si128(line + 1, b);
    _mm_stream_si128(line + 2, c);
    _mm_stream_si128(line + 3, d);
  }
  std::memcpy(to, from, nbytes);
  _mm_sfence();  // whoever is told that it is here sees all of it
#else
  std::memcpy(target, source, nbytes);
#endif
}

}  // namespace asyncckpt
