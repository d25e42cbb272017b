// The kernel of asyncckpt/kernels.py on a CPU: its very text, in the file that KERNEL names.
//
// As a library, launch_gather() runs it over memory of this process, thread by thread. As a program (PROGRAM
// defined; argument: a seed), random tables are held against memcpy, to be run under sanitizers: every source
// is an allocation of its own, to the byte, and a vector at the wrong address is an error.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

namespace {

struct Index {
  unsigned x = 0;
};
thread_local Index threadIdx, blockIdx, blockDim, gridDim;  // streams launch side by side
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

}  // namespace

#define __device__ static
#define __global__
#include KERNEL

extern "C" void launch_gather(const Count* table, Byte* target, Count rows, unsigned blocks,
                              unsigned threads) {
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) gather(table, target, rows);
}

#ifdef PROGRAM

namespace {

using Random = std::mt19937;

size_t up_to(Random& random, size_t most) { return random() % (most + 1); }

// One launch over a random table: more rows than blocks or fewer, any alignment, sizes from 0 to 70000.
bool is_right(Random& random) {
  const size_t rows = 1 + up_to(random, 60);
  const unsigned blocks = 1 + static_cast<unsigned>(up_to(random, 24));
  const unsigned threads = 32u << up_to(random, 3);
  std::vector<Byte*> allocations;
  std::vector<Count> table;
  size_t end = up_to(random, 100);
  for (size_t row = 0; row < rows; ++row) {
    const size_t lead = up_to(random, 2) ? up_to(random, 3) * 4 : up_to(random, 15);
    const size_t nbytes = up_to(random, up_to(random, 1) ? 70000 : 70);
    auto* const memory = static_cast<Byte*>(std::malloc(lead + nbytes + (lead + nbytes == 0)));
    for (size_t i = 0; i < lead + nbytes; ++i) memory[i] = static_cast<Byte>(random());
    allocations.push_back(memory);
    if (up_to(random, 1)) end += (lead - end) % 16;  // aligned alike
    table.insert(table.end(), {reinterpret_cast<Count>(memory + lead), end, nbytes});
    end += nbytes + up_to(random, 40);
  }
  auto* const target = static_cast<Byte*>(std::aligned_alloc(64, (end / 64 + 1) * 64));
  std::memset(target, 0xA5, end);
  std::vector<Byte> expected(target, target + end);
  for (size_t row = 0; row < rows; ++row)
    if (table[3 * row + 2] > 0)
      std::memcpy(&expected[table[3 * row + 1]], reinterpret_cast<void*>(table[3 * row]),
                  table[3 * row + 2]);
  launch_gather(table.data(), target, rows, blocks, threads);
  const bool same = std::equal(expected.begin(), expected.end(), target);
  for (Byte* const memory : allocations) std::free(memory);
  std::free(target);
  return same;
}

}  // namespace

int main(int, char** arguments) {
  Random random(static_cast<unsigned>(std::atoi(arguments[1])));
  for (int round = 0; round < 30; ++round)
    if (!is_right(random)) return std::printf("wrong bytes in round %d\n", round), 1;
  return 0;
}

#endif
