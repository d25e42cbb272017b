// Faults on demand, for tests: make the n-th operation of a kind fail, fall short, pause or kill.
//
// Disarmed (always, outside tests) an operation pays one relaxed atomic load.
#pragma once

#include <atomic>
#include <cstdint>

namespace asyncckpt::faults {

enum class Op : int { open, allocate, pwrite, pread, fsync, copy, count };

enum class Kind : int {
  error,    // the operation fails with the given errno
  shorten,  // a write takes only part of its bytes
  kill,     // SIGKILL to this process
  pause,    // the thread stops here until resume()
};

extern std::atomic<bool> armed;

// Arms one fault: the `nth` (from 0) operation of kind `op` from now on, and with `repeat` all later ones.
void arm(Op op, uint64_t nth, Kind kind, int error_number, bool repeat);
// Forgets every fault and count and lets paused threads go.
void disarm();
// Lets paused threads go; the fault stays armed.
void resume();
// How often an armed fault of this kind of operation fired since arm().
uint64_t hits(Op op);
// Blocks until a fault of `op` fired `n` times or the time is up; false in the latter case.
bool wait_for_hits(Op op, uint64_t n, double timeout_s);

struct Outcome {
  int error_number = 0;  // to be returned as if the kernel had
  bool shortened = false;
};

Outcome fire(Op op);  // the slow path: takes a lock

inline Outcome check(Op op) {
  if (!armed.load(std::memory_order_relaxed)) return {};
  return fire(op);
}

}  // namespace asyncckpt::faults
