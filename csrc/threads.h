// Starting threads in a host program that is not ours.
#pragma once

#include <signal.h>

#include <thread>
#include <vector>

namespace asyncckpt {

// Starts `body` on a new thread, joinable through `threads`. Signals sent to the process go to the
// host's own threads; faults of the thread itself (SIGSEGV and its like) are not held back.
// Throws std::system_error when no thread can be had.
template <typename Body>
void start_thread(std::vector<std::thread>& threads, Body body) {
  threads.emplace_back([body] {
    sigset_t signals;
    sigfillset(&signals);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT})
      sigdelset(&signals, fault);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    body();
  });
}

}  // namespace asyncckpt
