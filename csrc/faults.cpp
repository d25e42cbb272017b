#include "faults.h"

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <vector>

namespace asyncckpt::faults {

std::atomic<bool> armed{false};

namespace {

struct Fault {
  uint64_t nth;
  Kind kind;
  int error_number;
  bool repeat;
};

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Fault> faults[static_cast<int>(Op::count)];
  uint64_t seen[static_cast<int>(Op::count)] = {};
  uint64_t hits[static_cast<int>(Op::count)] = {};
  uint64_t resumed = 0;  // generation: a pause ends when it grows
};

State& state() {
  static State* instance = new State;  // never destroyed: threads may outlive static destructors
  return *instance;
}

}  // namespace

void arm(Op op, uint64_t nth, Kind kind, int error_number, bool repeat) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  const int index = static_cast<int>(op);
  s.faults[index].push_back({s.seen[index] + nth, kind, error_number, repeat});
  armed.store(true);
}

void disarm() {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  armed.store(false);
  for (int index = 0; index < static_cast<int>(Op::count); ++index) {
    s.faults[index].clear();
    s.seen[index] = s.hits[index] = 0;
  }
  ++s.resumed;
  s.changed.notify_all();
}

void resume() {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  ++s.resumed;
  s.changed.notify_all();
}

uint64_t hits(Op op) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return s.hits[static_cast<int>(op)];
}

bool wait_for_hits(Op op, uint64_t n, double timeout_s) {
  State& s = state();
  std::unique_lock<std::mutex> lock(s.mutex);
  return s.changed.wait_for(lock, std::chrono::duration<double>(timeout_s),
                            [&] { return s.hits[static_cast<int>(op)] >= n; });
}

Outcome fire(Op op) {
  State& s = state();
  std::unique_lock<std::mutex> lock(s.mutex);
  const int index = static_cast<int>(op);
  const uint64_t nth = s.seen[index]++;
  for (const Fault& fault : s.faults[index]) {
    if (nth != fault.nth && !(fault.repeat && nth > fault.nth)) continue;
    ++s.hits[index];
    s.changed.notify_all();
    switch (fault.kind) {
      case Kind::error:
        return {fault.error_number, false};
      case Kind::shorten:
        return {0, true};
      case Kind::kill:
        ::kill(::getpid(), SIGKILL);
        for (;;) ::pause();
      case Kind::pause: {
        const uint64_t generation = s.resumed;
        s.changed.wait(lock, [&] { return s.resumed != generation; });
        return {};
      }
    }
  }
  return {};
}

}  // namespace asyncckpt::faults
