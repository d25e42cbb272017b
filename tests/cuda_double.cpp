// A double of the CUDA driver: the same entry points, over "devices" made of threads and a memfd.
//
// What it keeps of the real one, because programs can get it wrong
//   - Device memory is mapped PROT_NONE where callers see it. Only copies and kernels reach the bytes,
//     through a second mapping of the same pages (double_backdoor).
//   - A stream runs its operations in order on a thread of its own, each after a random delay, so streams
//     overtake each other wherever no event holds them. Copies of a batch run in random order, long copies
//     in pieces with yields between: who writes beside them is really torn.
//   - A wait takes the event's most recent record at the time of the call; what was never recorded is done.
//   - Copies between device memory and host memory that is not pinned are done before the call returns.
//   - A copy outside a live allocation poisons its context for good; so do failures made to order.
//   - Stream capture forbids what it forbids, by the thread's mode, and is invalidated by it.
//   - With one connection, all streams of a device feed one queue: a blocked head blocks what came later.
//   - A child of fork() has no driver.
// What it leaves out: implicit ordering between the default stream and blocking streams (they are counted
// instead, see `blocking_streams`), graphs (captured operations are counted, never run), unjoined captures.
//
// One mutex guards everything but the bytes. Nothing is ever destroyed: threads outlive main(). The control interface (double_*) is at the end; it is neither logged nor counted.
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Result = int;
using Address = unsigned long long;
using Lock = std::unique_lock<std::mutex>;
using Random = std::minstd_rand;

constexpr Result kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3,
                 kDeinitialized = 4, kInvalidDevice = 101, kInvalidContext = 201,
                 kInvalidHandle = 400, kNotReady = 600, kIllegalAddress = 700,
                 kContextIsDestroyed = 709, kAlreadyRegistered = 712, kNotRegistered = 713,
                 kLaunchFailed = 719, kNotSupported = 801, kCaptureUnsupported = 900,
                 kCaptureInvalidated = 901, kCaptureIsolation = 905, kCapturedEvent = 907;

struct Message {
  Result result;
  const char* name;
  const char* text;
};
constexpr Message kMessages[] = {
    {kSuccess, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {kDeinitialized, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kNotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {kContextIsDestroyed, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {kAlreadyRegistered, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "the memory is already registered"},
    {kNotRegistered, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "the memory is not registered"},
    {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "not permitted while a stream captures"},
    {kCaptureInvalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "a previous error ended the capture"},
    {kCaptureIsolation, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "the capture depends on uncaptured work"},
    {kCapturedEvent, "CUDA_ERROR_CAPTURED_EVENT", "the event was last recorded in a capture"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

constexpr int kDevicesMax = 8;
constexpr size_t kDeviceNbytes = size_t{8}
                                 << 30;  // of address space; pages come when they are written
constexpr size_t kAlignment = 512;
constexpr size_t kLogLinesMax = 100000;
constexpr auto kDrainTimeout = std::chrono::seconds(30);
constexpr int kModeGlobal = 0, kModeRelaxed = 2;
constexpr int kAccessInStreamOrder = 1, kAccessAny = 3;
constexpr unsigned kNonBlockingStream = 1, kBlockingSync = 1, kPortable = 1;

struct Capture {
  int mode;
  int thread;
  bool active = true;
  bool invalidated = false;
};

struct Context {
  int ordinal = 0;
  Result error = kSuccess;  // sticky
  int retained = 0;
  bool destroyed = false;
  char* memory = nullptr;                 // PROT_NONE, what callers see
  char* backdoor = nullptr;               // the same pages, ours
  std::map<size_t, size_t> live, vacant;  // offset -> nbytes
  struct Stream* legacy = nullptr;
  std::deque<struct Stream*> connection;  // with one connection: whose operation may start next
};

struct Mark {  // one cuEventRecord
  bool started = false;
  bool done = false;
  Result error = kSuccess;
  struct Stream* stream = nullptr;  // where it was recorded, once it was
};

struct Event {
  Context* context;
  unsigned flags;
  std::shared_ptr<Mark> latest;
  std::shared_ptr<Mark> next;  // of double_wait_next: what the next record will be
  std::shared_ptr<Capture> capture;
};

struct Copy {
  Address target, source;
  size_t nbytes;
  std::shared_ptr<std::vector<char>>
      early{};  // the source's bytes, where it may be read at any time
};

struct Operation {
  enum class Kind { copies, kernel, record, wait };
  Kind kind;
  const char* entry_point = "";
  std::vector<Copy> copies{};
  void (*kernel)(void*) = nullptr;
  void* argument = nullptr;
  std::shared_ptr<Mark> mark{};
};

struct Stream {
  Context* context;
  std::deque<Operation> queue{};  // the front stays while it runs
  bool running = false;
  bool closed = false;
  uint64_t submitted = 0, finished = 0;
  std::condition_variable wake{};
  std::shared_ptr<Capture> capture{};
  Random random{};
};

struct Pinned {
  size_t nbytes;
  unsigned flags;
  Context* context;
};

struct Failure {
  std::string entry_point;
  uint64_t remaining;
  Result result;
  bool sticky;
};

struct World {
  std::mutex mutex;
  std::condition_variable changed;
  bool initialized = false, deinitialized = false;
  int device_count = 2;
  std::vector<Context*> contexts;  // kDevicesMax of them, once initialized
  std::vector<Stream*> streams;    // all there ever were
  std::set<Stream*> live_streams;
  std::set<Event*> live_events;
  std::map<uintptr_t, Pinned> pinned;
  std::vector<std::shared_ptr<Capture>> captures;  // active ones
  unsigned seed = 0;
  std::atomic<unsigned> delay_us_max{0};
  bool one_connection = false;
  int batch_abis = 3;  // 1: CUDA 12.8's, 2: CUDA 13's
  bool holding = false;
  int held = 0;
  uint64_t bytes_to_host = 0, bytes_to_device = 0;
  std::vector<Failure> failures, async_failures;
  std::set<std::string> ignored, stalled;
  int stalling = 0;
  std::map<std::string, uint64_t> calls, counters;
  std::deque<std::string> log;
};

World& world() {
  static World& w = *new World();
  return w;
}

// A child has the state as it was between two calls, and no threads: the driver answers that it is not
// initialised, the control interface that nothing can be waited for.
std::atomic<bool> forked{false};
__attribute__((constructor)) void watch_forks() {
  pthread_atfork([] { world().mutex.lock(); }, [] { world().mutex.unlock(); },
                 [] {
                   forked.store(true);
                   world().mutex.unlock();
                 });
}

// Something changed: wakes whoever waits for the state, and the streams that have something to do.
void announce() {
  World& w = world();
  w.changed.notify_all();
  for (Stream* stream : w.streams)
    if (!stream->running && (stream->closed || !stream->queue.empty())) stream->wake.notify_one();
}

// Fixed when the driver is initialised, so that double_device_of() needs no lock.
std::atomic<char*> memories[kDevicesMax];

std::atomic<int> thread_count{0};
thread_local int thread_number = -1;
thread_local int thread_mode = kModeGlobal;
thread_local std::vector<Context*> current_contexts;

int this_thread() {
  if (thread_number < 0) thread_number = thread_count++;
  return thread_number;
}

Context* current() { return current_contexts.empty() ? nullptr : current_contexts.back(); }

int device_of(Address address) {
  for (int i = 0; i < kDevicesMax; ++i) {
    const auto begin = reinterpret_cast<Address>(memories[i].load(std::memory_order_relaxed));
    if (begin != 0 && address >= begin && address < begin + kDeviceNbytes) return i;
  }
  return -1;
}

Context* context_of(Address address) {
  const int device = device_of(address);
  return device < 0 ? nullptr : world().contexts[static_cast<size_t>(device)];
}

// Where the double itself reads and writes an address.
char* bytes_at(Address address) {
  Context* const context = context_of(address);
  if (context == nullptr) return reinterpret_cast<char*>(address);
  return context->backdoor + (address - reinterpret_cast<Address>(context->memory));
}

bool is_live(Address address, size_t nbytes) {
  Context* const context = context_of(address);
  const size_t offset = static_cast<size_t>(address - reinterpret_cast<Address>(context->memory));
  auto after = context->live.upper_bound(offset);
  if (after == context->live.begin()) return false;
  --after;
  return offset + nbytes <= after->first + after->second;
}

void poison(Context& context, Result error) {
  if (context.error == kSuccess) context.error = error;
  announce();
}

// ---- Streams -----------------------------------------------------------------------------------

void nap(Random& random) {
  const unsigned us_max = world().delay_us_max;
  if (us_max == 0) return;
  if (const unsigned us = static_cast<unsigned>(random()) % (us_max + 1))
    std::this_thread::sleep_for(std::chrono::microseconds(us));
}

// The stream whose front decides when this one's front may start.
Stream& decider(Stream& stream) {
  const auto& connection = stream.context->connection;
  return connection.empty() ? stream : *connection.front();
}

bool can_start(Stream& stream) {
  if (stream.queue.empty()) return false;
  if (&decider(stream) != &stream) return false;
  const Operation& front = stream.queue.front();
  return front.kind != Operation::Kind::wait || front.mark->done ||
         stream.context->error != kSuccess;
}

// Follows who waits for whom. More steps than there are streams: they go round in a circle.
bool waits_for_itself(Stream& stream) {
  Stream* at = &stream;
  for (size_t steps = 0; steps <= world().streams.size(); ++steps) {
    Stream& head = decider(*at);
    if (head.running || head.queue.empty()) return false;
    const Operation& front = head.queue.front();
    if (front.kind != Operation::Kind::wait) return false;
    const Mark& awaited = *front.mark;
    if (awaited.done || awaited.started || awaited.stream == nullptr) return false;
    at = awaited.stream;
  }
  return true;
}

// True when a failure made to order is due.
bool due(std::vector<Failure>& failures, const char* entry_point, Failure* found) {
  for (auto failure = failures.begin(); failure != failures.end(); ++failure) {
    if (failure->entry_point != entry_point) continue;
    if (failure->remaining-- > 0) continue;
    *found = *failure;
    failures.erase(failure);
    return true;
  }
  return false;
}

void hold_if_told(Lock& lock, const Context& context) {
  World& w = world();
  if (!w.holding) return;
  ++w.held;
  announce();
  w.changed.wait(lock, [&] { return !w.holding || context.error != kSuccess; });
  --w.held;
  announce();
}

bool goes_to_host(const Copy& copy) {
  return device_of(copy.source) >= 0 && device_of(copy.target) < 0;
}

void run_copy(Lock& lock, Context& context, const char* entry_point, const Copy& copy,
              Random& random) {
  World& w = world();
  Failure failure;
  if (due(w.async_failures, entry_point, &failure)) return poison(context, failure.result);
  for (const Address address : {copy.target, copy.source})
    if (device_of(address) >= 0 && !is_live(address, copy.nbytes))
      return poison(context, kIllegalAddress);
  char* const to = bytes_at(copy.target);
  const char* const from = copy.early ? copy.early->data() : bytes_at(copy.source);
  lock.unlock();
  // Long copies: eight pieces at most, one long pause between two of them, so that writers get in between.
  const size_t pieces = std::min<size_t>(8, 1 + copy.nbytes / (size_t{64} << 10));
  const size_t pause_after = 1 + random() % pieces;
  for (size_t i = 0; i < pieces; ++i) {
    const size_t begin = copy.nbytes * i / pieces, end = copy.nbytes * (i + 1) / pieces;
    std::memcpy(to + begin, from + begin, end - begin);
    if (i + 1 < pieces) sched_yield();
    if (i + 1 < pieces && i + 1 == pause_after) nap(random);
  }
  lock.lock();
  if (goes_to_host(copy)) {
    w.bytes_to_host += copy.nbytes;
    ++w.counters["copies_to_host"];
  }
  if (device_of(copy.source) < 0 && device_of(copy.target) >= 0) w.bytes_to_device += copy.nbytes;
}

void run_copies(Lock& lock, Context& context, Operation& operation, Random& random) {
  std::vector<size_t> order(operation.copies.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  if (std::any_of(operation.copies.begin(), operation.copies.end(), goes_to_host))
    hold_if_told(lock, context);
  size_t done = 0;
  for (const size_t index : order) {
    if (context.error != kSuccess) return;
    run_copy(lock, context, operation.entry_point, operation.copies[index], random);
    if (done++ < 8 && operation.copies.size() > 1) {
      lock.unlock();
      nap(random);
      lock.lock();
    }
  }
}

void* run_stream(void* argument) {
  Stream& stream = *static_cast<Stream*>(argument);
  Context& context = *stream.context;
  World& w = world();
  Lock lock(w.mutex);
  for (;;) {
    while (!can_start(stream)) {
      if (stream.closed && stream.queue.empty()) return nullptr;
      if (context.error == kSuccess && waits_for_itself(stream)) {
        ++w.counters["deadlocks"];
        poison(context, kLaunchFailed);
        continue;
      }
      stream.wake.wait(lock);
    }
    Operation& operation = stream.queue.front();
    stream.running = true;
    if (operation.kind == Operation::Kind::record) operation.mark->started = true;
    if (!context.connection.empty()) context.connection.pop_front();
    announce();
    Random random(stream.random());
    if (context.error == kSuccess) {
      lock.unlock();
      nap(random);
      if (operation.kind == Operation::Kind::kernel) operation.kernel(operation.argument);
      lock.lock();
      if (operation.kind == Operation::Kind::copies) run_copies(lock, context, operation, random);
    }
    if (operation.kind == Operation::Kind::record) {
      operation.mark->done = true;
      operation.mark->error = context.error;
    }
    stream.queue.pop_front();
    stream.running = false;
    ++stream.finished;
    announce();
  }
}

Stream* make_stream(Context& context) {
  World& w = world();
  auto* const stream = new Stream{&context};
  stream->random.seed(w.seed + static_cast<unsigned>(w.streams.size()) + 1);
  w.streams.push_back(stream);
  w.live_streams.insert(stream);
  // The program's signals are not for our threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_t thread;
  if (pthread_create(&thread, nullptr, run_stream, stream) == 0) pthread_detach(thread);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return stream;
}

// `handle` 0, and 1 (CU_STREAM_LEGACY), are the default stream of the current context's device.
Result find_stream(const void* handle, Stream** stream) {
  if (reinterpret_cast<uintptr_t>(handle) <= 1) {
    if (current() == nullptr) return kInvalidContext;
    *stream = current()->legacy;
  } else {
    *stream = static_cast<Stream*>(const_cast<void*>(handle));
    if (world().live_streams.count(*stream) == 0) return kInvalidHandle;
  }
  return (*stream)->context->error;
}

Result find_event(const void* handle, Event** event) {
  *event = static_cast<Event*>(const_cast<void*>(handle));
  if (world().live_events.count(*event) == 0) return kInvalidHandle;
  return (*event)->context->error;
}

// True when the stream captures: then `result` is what the call has to answer.
bool captures(Stream& stream, Result* result) {
  if (!stream.capture) return false;
  *result = stream.capture->invalidated ? kCaptureInvalidated : kSuccess;
  if (*result == kSuccess) ++world().counters["captured"];
  return true;
}

Result finish(Lock& lock, Stream& stream, uint64_t number) {
  World& w = world();
  if (forked.load()) return kNotInitialized;
  w.changed.wait(lock, [&] { return stream.finished >= number || w.deinitialized; });
  return w.deinitialized ? kDeinitialized : stream.context->error;
}

Result submit(Lock& lock, Stream& stream, Operation operation, bool synchronous = false) {
  World& w = world();
  Result result = kSuccess;
  if (captures(stream, &result)) return result;
  stream.queue.push_back(std::move(operation));
  const uint64_t number = ++stream.submitted;
  if (w.one_connection) stream.context->connection.push_back(&stream);
  announce();
  return synchronous ? finish(lock, stream, number) : kSuccess;
}

bool idle(const Stream& stream) { return stream.queue.empty(); }

bool is_pinned(uintptr_t address, size_t nbytes, const Context& context) {
  const auto& pinned = world().pinned;
  auto after = pinned.upper_bound(address);
  if (after == pinned.begin()) return false;
  --after;
  return address + nbytes <= after->first + after->second.nbytes &&
         ((after->second.flags & kPortable) != 0 || after->second.context == &context);
}

Result submit_copies(Lock& lock, const char* entry_point, const void* handle,
                     std::vector<Copy> copies, bool synchronous = false) {
  Stream* stream = nullptr;
  if (const Result result = find_stream(handle, &stream); result != kSuccess) return result;
  bool pageable = false;
  for (const Copy& copy : copies)
    for (const Address address : {copy.target, copy.source})
      if (device_of(address) < 0) pageable |= !is_pinned(address, copy.nbytes, *stream->context);
  if (pageable && !stream->capture && !synchronous) ++world().counters["pageable"];
  Operation operation{Operation::Kind::copies, entry_point};
  operation.copies = std::move(copies);
  return submit(lock, *stream, std::move(operation), synchronous || pageable);
}

// ---- Calls -------------------------------------------------------------------------------------

enum Needs { kNothing = 0, kDriver = 1, kContext = 2, kNoCapture = 4 };

bool disturbs_a_capture() {
  if (thread_mode == kModeRelaxed) return false;
  bool disturbed = false;
  for (const auto& capture : world().captures) {
    const bool here = capture->thread == this_thread() && capture->mode != kModeRelaxed;
    const bool there = thread_mode == kModeGlobal && capture->mode == kModeGlobal;
    if (here || there) disturbed = capture->invalidated = true;
  }
  return disturbed;
}

// What every entry point does first: log, count, fail to order, and see that its needs are met.
class Call {
 public:
  Call(const char* name, int needs) {
    if (forked.load()) {
      result_ = kNotInitialized;
      return;
    }
    World& w = world();
    lock_ = Lock(w.mutex);
    if (w.stalled.count(name) != 0) {
      ++w.stalling;
      announce();
      w.changed.wait(lock_, [&] { return w.stalled.count(name) == 0; });
      --w.stalling;
    }
    w.log.push_back(std::string(name) + " " + std::to_string(this_thread()));
    if (w.log.size() > kLogLinesMax) w.log.pop_front();
    ++w.calls[name];
    result_ = refusal(name, needs);
    over_ = result_ != kSuccess || w.ignored.count(name) != 0;
  }

  bool over() const { return over_; }
  Result result() const { return result_; }
  Lock& lock() { return lock_; }

 private:
  static Result refusal(const char* name, int needs) {
    World& w = world();
    if (w.deinitialized) return kDeinitialized;
    if ((needs & (kDriver | kContext)) != 0 && !w.initialized) return kNotInitialized;
    if ((needs & kContext) != 0) {
      if (current() == nullptr) return kInvalidContext;
      if (current()->destroyed) return kContextIsDestroyed;
      if (current()->error != kSuccess) return current()->error;
    }
    if (Failure failure; due(w.failures, name, &failure)) {
      if (failure.sticky && current() != nullptr) poison(*current(), failure.result);
      return failure.result;
    }
    return (needs & kNoCapture) != 0 && disturbs_a_capture() ? kCaptureUnsupported : kSuccess;
  }

  Lock lock_;
  Result result_ = kSuccess;
  bool over_ = true;
};

#define ENTER(needs)          \
  Call call(__func__, needs); \
  if (call.over()) return call.result()

bool map_memory(Context& context) {
  const int fd = memfd_create("cuda_double", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, kDeviceNbytes) != 0) return false;
  void* const backdoor =
      mmap(nullptr, kDeviceNbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  void* const memory = mmap(nullptr, kDeviceNbytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  close(fd);
  if (backdoor == MAP_FAILED || memory == MAP_FAILED) return false;
  for (void* mapping : {backdoor, memory}) {
    madvise(mapping, kDeviceNbytes, MADV_DONTDUMP);
    madvise(mapping, kDeviceNbytes, MADV_DONTFORK);
  }
  context.backdoor = static_cast<char*>(backdoor);
  context.memory = static_cast<char*>(memory);
  context.vacant[0] = kDeviceNbytes;
  memories[context.ordinal].store(context.memory);
  return true;
}

Result initialize() {
  World& w = world();
  if (w.initialized) return kSuccess;
  for (int i = 0; i < kDevicesMax; ++i) {
    auto* const context = new Context();
    context->ordinal = i;
    if (!map_memory(*context)) return kOutOfMemory;
    w.contexts.push_back(context);
    context->legacy = make_stream(*context);
  }
  w.initialized = true;
  return kSuccess;
}

Context* context_at(int ordinal) {
  const World& w = world();
  if (!w.initialized || ordinal < 0 || ordinal >= w.device_count) return nullptr;
  return w.contexts[static_cast<size_t>(ordinal)];
}

// First fit, with room between allocations: who runs over the end of one hits nothing live.
Result allocate(Context& context, size_t nbytes, Address* address) {
  if (nbytes == 0) return kInvalidValue;
  const size_t taken = (nbytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
  for (auto [offset, room] : context.vacant) {
    if (room < taken) continue;
    context.vacant.erase(offset);
    if (room > taken) context.vacant[offset + taken] = room - taken;
    context.live[offset] = nbytes;
    *address = reinterpret_cast<Address>(context.memory + offset);
    return kSuccess;
  }
  return kOutOfMemory;
}

bool device_idle(const Context& context) {
  const auto& streams = world().streams;
  return std::all_of(streams.begin(), streams.end(), [&](const Stream* stream) {
    return stream->context != &context || idle(*stream);
  });
}

Result finish_device(Lock& lock, const Context& context) {
  World& w = world();
  if (forked.load()) return kNotInitialized;
  w.changed.wait(lock, [&] { return device_idle(context) || w.deinitialized; });
  return w.deinitialized ? kDeinitialized : context.error;
}

Result release(Lock& lock, Address address) {
  Context* const context = context_of(address);
  if (context == nullptr) return kInvalidValue;
  const size_t offset = static_cast<size_t>(address - reinterpret_cast<Address>(context->memory));
  if (context->live.count(offset) == 0) return kInvalidValue;
  const Result result = finish_device(lock, *context);
  const auto found = context->live.find(offset);
  if (found == context->live.end()) return kInvalidValue;
  const size_t nbytes = found->second;
  context->live.erase(found);
  lock.unlock();
  std::memset(context->backdoor + offset, 0xDB, nbytes);
  lock.lock();
  size_t room = (nbytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
  const auto after = context->vacant.lower_bound(offset);
  if (after != context->vacant.end() && offset + room == after->first) {
    room += after->second;
    context->vacant.erase(after);
  }
  auto before = context->vacant.lower_bound(offset);
  if (before != context->vacant.begin() &&
      std::prev(before)->first + std::prev(before)->second == offset)
    std::prev(before)->second += room;
  else context->vacant[offset] = room;
  return result;
}

bool is_mapped(const void* memory, size_t nbytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) / page * page;
  const size_t length = reinterpret_cast<uintptr_t>(memory) + nbytes - begin;
  std::vector<unsigned char> resident((length + page - 1) / page);
  return mincore(reinterpret_cast<void*>(begin), length, resident.data()) == 0;
}

bool in_use(uintptr_t begin, size_t nbytes) {
  const auto overlaps = [&](Address address, size_t copy_nbytes) {
    return address < begin + nbytes && begin < address + copy_nbytes;
  };
  for (const Stream* stream : world().streams)
    for (const Operation& operation : stream->queue)
      for (const Copy& copy : operation.copies)
        if (overlaps(copy.target, copy.nbytes) || overlaps(copy.source, copy.nbytes)) return true;
  return false;
}

struct CopyAttributes {
  int source_access_order;
  struct {
    int type, id;
  } source_hint, target_hint;
  unsigned flags;
};

[[maybe_unused]] Result submit_batch(Call& call, const char* entry_point, int abi, Address* targets,
                                     Address* sources, size_t* sizes, size_t count,
                                     CopyAttributes* attributes, size_t* firsts,
                                     size_t attributes_count, void* handle) {
  if ((world().batch_abis & abi) == 0) return kNotSupported;
  if (reinterpret_cast<uintptr_t>(handle) <= 1 || count == 0 || attributes == nullptr ||
      firsts == nullptr || attributes_count == 0 || attributes_count > count || firsts[0] != 0)
    return kInvalidValue;
  for (size_t i = 0; i < attributes_count; ++i) {
    const int order = attributes[i].source_access_order;
    if (order < kAccessInStreamOrder || order > kAccessAny) return kInvalidValue;
    if (i > 0 && (firsts[i] <= firsts[i - 1] || firsts[i] >= count)) return kInvalidValue;
  }
  Stream* stream = nullptr;
  if (const Result result = find_stream(handle, &stream); result != kSuccess) return result;
  std::vector<Copy> copies;
  size_t attribute = 0;
  for (size_t i = 0; i < count; ++i) {
    while (attribute + 1 < attributes_count && firsts[attribute + 1] <= i) ++attribute;
    Copy copy{targets[i], sources[i], sizes[i]};
    // Whoever allows the source to be read out of stream order gets what it holds now.
    if (attributes[attribute].source_access_order != kAccessInStreamOrder && !stream->capture) {
      if (device_of(copy.source) >= 0 && !is_live(copy.source, copy.nbytes)) return kInvalidValue;
      const char* const from = bytes_at(copy.source);
      copy.early = std::make_shared<std::vector<char>>(from, from + copy.nbytes);
    }
    copies.push_back(std::move(copy));
  }
  return submit_copies(call.lock(), entry_point, handle, std::move(copies));
}

}  // namespace

// ---- The driver's interface --------------------------------------------------------------------

extern "C" {

Result cuInit(unsigned flags) {
  ENTER(kNothing);
  return flags == 0 ? initialize() : kInvalidValue;
}

Result cuDriverGetVersion(int* version) {
  ENTER(kNothing);
#if defined(NO_BATCH)
  *version = 12040;
#elif defined(BATCH_V1_ONLY)
  *version = 12080;
#else
  *version = 13000;
#endif
  return kSuccess;
}

Result cuDeviceGetCount(int* count) {
  ENTER(kDriver);
  *count = world().device_count;
  return kSuccess;
}

Result cuDeviceGet(int* device, int ordinal) {
  ENTER(kDriver);
  if (context_at(ordinal) == nullptr) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

Result cuDeviceGetPCIBusId(char* text, int nbytes, int device) {
  ENTER(kDriver);
  if (context_at(device) == nullptr) return kInvalidDevice;
  if (nbytes < 13) return kInvalidValue;
  snprintf(text, static_cast<size_t>(nbytes), "0000:%02X:00.0", (device + 1) & 0xff);
  return kSuccess;
}

Result cuDevicePrimaryCtxRetain(Context** context, int device) {
  ENTER(kDriver);
  Context* const found = context_at(device);
  if (found == nullptr) return kInvalidDevice;
  ++found->retained;
  found->destroyed = false;
  *context = found;
  return kSuccess;
}

Result cuDevicePrimaryCtxRelease_v2(int device) {
  ENTER(kDriver);
  Context* const found = context_at(device);
  if (found == nullptr) return kInvalidDevice;
  if (found->retained == 0) return kInvalidContext;
  found->destroyed = --found->retained == 0;
  return kSuccess;
}

static bool is_context(Context* context) {
  const auto& contexts = world().contexts;
  return std::find(contexts.begin(), contexts.end(), context) != contexts.end();
}

Result cuCtxSetCurrent(Context* context) {
  ENTER(kDriver);
  if (context != nullptr && !is_context(context)) return kInvalidContext;
  if (!current_contexts.empty()) current_contexts.pop_back();
  if (context != nullptr) current_contexts.push_back(context);
  return kSuccess;
}

Result cuCtxGetCurrent(Context** context) {
  ENTER(kDriver);
  *context = current();
  return kSuccess;
}

Result cuCtxPushCurrent_v2(Context* context) {
  ENTER(kDriver);
  if (!is_context(context)) return kInvalidContext;
  current_contexts.push_back(context);
  return kSuccess;
}

Result cuCtxPopCurrent_v2(Context** context) {
  ENTER(kDriver);
  if (current_contexts.empty()) return kInvalidContext;
  if (context != nullptr) *context = current();
  current_contexts.pop_back();
  return kSuccess;
}

Result cuCtxSynchronize(void) {
  ENTER(kContext | kNoCapture);
  return finish_device(call.lock(), *current());
}

static Result create_stream(Stream** stream, unsigned flags) {
  if ((flags & ~kNonBlockingStream) != 0) return kInvalidValue;
  if ((flags & kNonBlockingStream) == 0) ++world().counters["blocking_streams"];
  *stream = make_stream(*current());
  return kSuccess;
}

Result cuStreamCreate(Stream** stream, unsigned flags) {
  ENTER(kContext);
  return create_stream(stream, flags);
}

Result cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) {
  ENTER(kContext);
  return create_stream(stream, flags);
}

Result cuStreamDestroy_v2(Stream* handle) {
  ENTER(kContext);
  if (world().live_streams.erase(handle) == 0) return kInvalidHandle;
  handle->closed = true;
  announce();
  return kSuccess;
}

Result cuStreamWaitEvent(void* handle, void* event_handle, unsigned flags) {
  ENTER(kContext);
  Stream* stream = nullptr;
  Event* event = nullptr;
  if (flags > 1) return kInvalidValue;
  if (const Result result = find_stream(handle, &stream); result != kSuccess) return result;
  if (const Result result = find_event(event_handle, &event); result != kSuccess) return result;
  if (stream->capture && event->capture != stream->capture) {
    const bool before = std::exchange(stream->capture->invalidated, true);
    return before ? kCaptureInvalidated : kCaptureIsolation;
  }
  if (event->capture && !event->capture->active) return kCapturedEvent;
  if (event->capture) stream->capture = event->capture;  // the stream joins the capture
  if (!stream->capture && (!event->latest || event->latest->done)) return kSuccess;
  Operation operation{Operation::Kind::wait};
  operation.mark = event->latest;
  return submit(call.lock(), *stream, std::move(operation));
}

Result cuStreamIsCapturing(void* handle, int* status) {
  ENTER(kContext);
  Stream* stream = nullptr;
  if (const Result result = find_stream(handle, &stream); result != kSuccess) return result;
  *status = !stream->capture ? 0 : stream->capture->invalidated ? 2 : 1;
  return kSuccess;
}

Result cuStreamSynchronize(void* handle) {
  ENTER(kContext | kNoCapture);
  Stream* stream = nullptr;
  if (const Result result = find_stream(handle, &stream); result != kSuccess) return result;
  return finish(call.lock(), *stream, stream->submitted);
}

Result cuEventCreate(Event** event, unsigned flags) {
  ENTER(kContext);
  *event = new Event{current(), flags, nullptr, nullptr, nullptr};
  world().live_events.insert(*event);
  return kSuccess;
}

Result cuEventRecord(void* event_handle, void* handle) {
  ENTER(kContext);
  Stream* stream = nullptr;
  Event* event = nullptr;
  if (const Result result = find_stream(handle, &stream); result != kSuccess) return result;
  if (const Result result = find_event(event_handle, &event); result != kSuccess) return result;
  if (event->context != stream->context) return kInvalidHandle;
  event->capture = stream->capture;
  Operation operation{Operation::Kind::record};
  if (!stream->capture) {
    event->latest = event->next ? std::move(event->next) : std::make_shared<Mark>();
    event->next = nullptr;
    event->latest->stream = stream;
    operation.mark = event->latest;
  }
  return submit(call.lock(), *stream, std::move(operation));
}

Result cuEventQuery(void* event_handle) {
  ENTER(kContext | kNoCapture);
  Event* event = nullptr;
  if (const Result result = find_event(event_handle, &event); result != kSuccess) return result;
  if (event->capture) {
    event->capture->invalidated = true;
    return kCapturedEvent;
  }
  return !event->latest || event->latest->done ? kSuccess : kNotReady;
}

Result cuEventSynchronize(void* event_handle) {
  ENTER(kContext | kNoCapture);
  World& w = world();
  Event* event = nullptr;
  if (const Result result = find_event(event_handle, &event); result != kSuccess) return result;
  if (event->capture) {
    event->capture->invalidated = true;
    return kCapturedEvent;
  }
  if ((event->flags & kBlockingSync) == 0) ++w.counters["spinning_waits"];
  Context& context = *event->context;
  if (const std::shared_ptr<Mark> mark = event->latest)
    w.changed.wait(call.lock(),
                   [&] { return mark->done || context.error != kSuccess || w.deinitialized; });
  return w.deinitialized ? kDeinitialized : context.error;
}

Result cuEventDestroy_v2(Event* event) {
  ENTER(kContext);
  if (world().live_events.erase(event) == 0) return kInvalidHandle;
  delete event;
  return kSuccess;
}

Result cuMemcpyDtoHAsync_v2(void* target, Address source, size_t nbytes, void* stream) {
  ENTER(kContext);
  if (device_of(source) < 0) return kInvalidValue;
  return submit_copies(call.lock(), __func__, stream,
                       {{reinterpret_cast<Address>(target), source, nbytes}});
}

Result cuMemcpyHtoDAsync_v2(Address target, const void* source, size_t nbytes, void* stream) {
  ENTER(kContext);
  if (device_of(target) < 0) return kInvalidValue;
  return submit_copies(call.lock(), __func__, stream,
                       {{target, reinterpret_cast<Address>(source), nbytes}});
}

Result cuMemcpyDtoDAsync_v2(Address target, Address source, size_t nbytes, void* stream) {
  ENTER(kContext);
  if (device_of(target) < 0 || device_of(source) < 0) return kInvalidValue;
  return submit_copies(call.lock(), __func__, stream, {{target, source, nbytes}});
}

Result cuMemcpyDtoH_v2(void* target, Address source, size_t nbytes) {
  ENTER(kContext | kNoCapture);
  if (device_of(source) < 0) return kInvalidValue;
  return submit_copies(call.lock(), __func__, nullptr,
                       {{reinterpret_cast<Address>(target), source, nbytes}}, true);
}

Result cuMemcpyHtoD_v2(Address target, const void* source, size_t nbytes) {
  ENTER(kContext | kNoCapture);
  if (device_of(target) < 0) return kInvalidValue;
  return submit_copies(call.lock(), __func__, nullptr,
                       {{target, reinterpret_cast<Address>(source), nbytes}}, true);
}

#if !defined(NO_BATCH) && !defined(BATCH_V2_ONLY)
Result cuMemcpyBatchAsync(Address* targets, Address* sources, size_t* sizes, size_t count,
                          CopyAttributes* attributes, size_t* firsts, size_t attributes_count,
                          size_t* failed, void* stream) {
  if (failed != nullptr) *failed = SIZE_MAX;  // no copy in particular
  ENTER(kContext);
  return submit_batch(call, __func__, 1, targets, sources, sizes, count, attributes, firsts,
                      attributes_count, stream);
}
#endif

#if !defined(NO_BATCH) && !defined(BATCH_V1_ONLY)
Result cuMemcpyBatchAsync_v2(Address* targets, Address* sources, size_t* sizes, size_t count,
                             CopyAttributes* attributes, size_t* firsts, size_t attributes_count,
                             void* stream) {
  ENTER(kContext);
  return submit_batch(call, __func__, 2, targets, sources, sizes, count, attributes, firsts,
                      attributes_count, stream);
}
#endif

Result cuMemAlloc_v2(Address* address, size_t nbytes) {
  ENTER(kContext | kNoCapture);
  return allocate(*current(), nbytes, address);
}

Result cuMemFree_v2(Address address) {
  ENTER(kContext | kNoCapture);
  return release(call.lock(), address);
}

Result cuMemHostRegister_v2(void* memory, size_t nbytes, unsigned flags) {
  ENTER(kContext | kNoCapture);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  if (memory == nullptr || nbytes == 0 || flags > 15 || device_of(begin) >= 0 ||
      !is_mapped(memory, nbytes))
    return kInvalidValue;
  auto& pinned = world().pinned;
  const auto after = pinned.lower_bound(begin);
  if (after != pinned.end() && after->first < begin + nbytes) return kAlreadyRegistered;
  if (after != pinned.begin() && std::prev(after)->first + std::prev(after)->second.nbytes > begin)
    return kAlreadyRegistered;
  pinned[begin] = {nbytes, flags, current()};
  return kSuccess;
}

Result cuMemHostUnregister(void* memory) {
  Call call(__func__, kContext | kNoCapture);
  auto& pinned = world().pinned;
  // A lost context refuses, and what it pinned is lost with it: double_reset() revives the context, but
  // the program has unmapped the memory by then.
  if (call.over() && call.result() != kSuccess && current() != nullptr &&
      call.result() == current()->error)
    pinned.erase(reinterpret_cast<uintptr_t>(memory));
  if (call.over()) return call.result();
  const auto found = pinned.find(reinterpret_cast<uintptr_t>(memory));
  if (found == pinned.end()) return kNotRegistered;
  if (in_use(found->first, found->second.nbytes)) ++world().counters["unregistered_in_use"];
  pinned.erase(found);
  return kSuccess;
}

#if !defined(OLD_DRIVER)  // this one came with CUDA 10.1
Result cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER(kDriver);
  if (*mode < kModeGlobal || *mode > kModeRelaxed) return kInvalidValue;
  std::swap(*mode, thread_mode);
  return kSuccess;
}
#endif

static Result find_message(Result result, const Message** message) {
  for (const Message& known : kMessages) {
    if (known.result != result) continue;
    *message = &known;
    return kSuccess;
  }
  return kInvalidValue;
}

Result cuGetErrorName(Result result, const char** name) {
  const Message* message = nullptr;
  const Result found = find_message(result, &message);
  *name = found == kSuccess ? message->name : nullptr;
  return found;
}

Result cuGetErrorString(Result result, const char** text) {
  const Message* message = nullptr;
  const Result found = find_message(result, &message);
  *text = found == kSuccess ? message->text : nullptr;
  return found;
}

// ---- The control interface ---------------------------------------------------------------------
//
// For tests, which drive it from the process that made the streams: of no use after fork().

// 0 when all work is done; kNotReady when some is still pending after half a minute.
Result double_drain(void) {
  World& w = world();
  if (forked.load()) return kNotInitialized;
  Lock lock(w.mutex);
  const auto all_idle = [&] {
    return std::all_of(w.streams.begin(), w.streams.end(),
                       [](const Stream* stream) { return idle(*stream); });
  };
  return w.changed.wait_for(lock, kDrainTimeout, all_idle) ? kSuccess : kNotReady;
}

// A new test: nothing held, failing, poisoned or captured; counters and log empty. Contexts, streams,
// events, allocations and pinned ranges (of memory that is still there) stay, since the program under
// test keeps its own for good.
Result double_reset(unsigned seed, unsigned delay_us_max) {
  World& w = world();
  {
    Lock lock(w.mutex);
    w.holding = false;
    w.stalled.clear();
    w.delay_us_max = 0;
    announce();
  }
  if (const Result result = double_drain(); result != kSuccess) return result;
  Lock lock(w.mutex);
  w.deinitialized = false;
  w.device_count = 2;
  w.one_connection = false;
  w.batch_abis = 3;
  w.seed = seed;
  w.delay_us_max = delay_us_max;
  w.bytes_to_host = w.bytes_to_device = 0;
  for (const auto& capture : w.captures) capture->active = false;
  w.captures.clear();
  w.failures.clear();
  w.async_failures.clear();
  w.ignored.clear();
  w.calls.clear();
  w.counters.clear();
  w.log.clear();
  for (Context* context : w.contexts) context->error = kSuccess;
  for (auto range = w.pinned.begin(); range != w.pinned.end();) {  // what could not be unpinned
    const bool gone = !is_mapped(reinterpret_cast<void*>(range->first), range->second.nbytes);
    range = gone ? w.pinned.erase(range) : std::next(range);
  }
  for (size_t i = 0; i < w.streams.size(); ++i) {
    w.streams[i]->random.seed(seed + static_cast<unsigned>(i) + 1);
    w.streams[i]->capture = nullptr;
  }
  return kSuccess;
}

void double_deinitialize(void) {
  Lock lock(world().mutex);
  world().deinitialized = true;
  announce();
}

Result double_set_devices(int count) {
  Lock lock(world().mutex);
  if (count < 0 || count > kDevicesMax) return kInvalidValue;
  world().device_count = count;
  return kSuccess;
}

// 1: all streams of a device share one queue (CUDA_DEVICE_MAX_CONNECTIONS=1); else each has its own.
Result double_set_connections(int count) {
  if (const Result result = double_drain(); result != kSuccess) return result;
  Lock lock(world().mutex);
  world().one_connection = count == 1;
  return kSuccess;
}

void double_set_batch_abi(int abis) {
  Lock lock(world().mutex);
  world().batch_abis = abis;
}

// Device memory and streams without a current context, for the side that plays the training program.
Address double_allocate(int device, size_t nbytes) {
  Lock lock(world().mutex);
  Context* const context = context_at(device);
  Address address = 0;
  return context != nullptr && allocate(*context, nbytes, &address) == kSuccess ? address : 0;
}

Result double_free(Address address) {
  Lock lock(world().mutex);
  return release(lock, address);
}

Stream* double_new_stream(int device) {
  Lock lock(world().mutex);
  Context* const context = context_at(device);
  return context == nullptr ? nullptr : make_stream(*context);
}

// The default stream of a device as a handle of its own, which needs no current context.
Stream* double_default_stream(int device) {
  Lock lock(world().mutex);
  Context* const context = context_at(device);
  return context == nullptr ? nullptr : context->legacy;
}

void* double_backdoor(Address address) {
  return device_of(address) < 0 ? nullptr : bytes_at(address);
}

int double_device_of(Address address) { return device_of(address); }

// A kernel: `function` runs on the stream's thread, in stream order. Captured, it is only counted.
Result double_launch(void* handle, void (*function)(void*), void* argument) {
  Lock lock(world().mutex);
  if (world().deinitialized) return kDeinitialized;
  Stream* stream = nullptr;
  if (const Result result = find_stream(handle, &stream); result != kSuccess) return result;
  Operation operation{Operation::Kind::kernel};
  operation.kernel = function;
  operation.argument = argument;
  return submit(lock, *stream, std::move(operation));
}

// Orders `handle` behind all that was submitted to `other` so far.
Result double_order(void* handle, void* other_handle) {
  Lock lock(world().mutex);
  Stream *stream = nullptr, *other = nullptr;
  if (const Result result = find_stream(handle, &stream); result != kSuccess) return result;
  if (const Result result = find_stream(other_handle, &other); result != kSuccess) return result;
  Operation record{Operation::Kind::record}, wait{Operation::Kind::wait};
  record.mark = wait.mark = std::make_shared<Mark>();
  record.mark->stream = other;
  if (const Result result = submit(lock, *other, std::move(record)); result != kSuccess)
    return result;
  return submit(lock, *stream, std::move(wait));
}

// Waits until all that was submitted to the stream so far is done.
Result double_finish(void* handle) {
  Lock lock(world().mutex);
  Stream* stream = nullptr;
  if (const Result result = find_stream(handle, &stream); result != kSuccess) return result;
  if (stream->capture) {
    stream->capture->invalidated = true;
    return kCaptureUnsupported;
  }
  return finish(lock, *stream, stream->submitted);
}

// What no event can express, but a wait for a value in memory does: the stream waits for a record of the
// event that is still to come.
Result double_wait_next(void* handle, void* event_handle) {
  Lock lock(world().mutex);
  Stream* stream = nullptr;
  Event* event = nullptr;
  if (const Result result = find_stream(handle, &stream); result != kSuccess) return result;
  if (const Result result = find_event(event_handle, &event); result != kSuccess) return result;
  if (!event->next) event->next = std::make_shared<Mark>();
  Operation operation{Operation::Kind::wait};
  operation.mark = event->next;
  return submit(lock, *stream, std::move(operation));
}

Result double_begin_capture(void* handle, int mode) {
  World& w = world();
  Lock lock(w.mutex);
  Stream* stream = nullptr;
  if (const Result result = find_stream(handle, &stream); result != kSuccess) return result;
  if (stream == stream->context->legacy) return kCaptureUnsupported;
  if (stream->capture || mode < kModeGlobal || mode > kModeRelaxed) return kInvalidValue;
  stream->capture = std::make_shared<Capture>(Capture{mode, this_thread()});
  w.captures.push_back(stream->capture);
  return kSuccess;
}

Result double_end_capture(void* handle) {
  World& w = world();
  Lock lock(w.mutex);
  Stream* stream = nullptr;
  if (const Result result = find_stream(handle, &stream); result != kSuccess) return result;
  const std::shared_ptr<Capture> capture = stream->capture;
  if (!capture) return kInvalidValue;
  capture->active = false;
  w.captures.erase(std::remove(w.captures.begin(), w.captures.end(), capture), w.captures.end());
  for (Stream* each : w.streams)
    if (each->capture == capture) each->capture = nullptr;
  return capture->invalidated ? kCaptureInvalidated : kSuccess;
}

// The nth call from now (from 0) fails; `sticky`: and with it the calling thread's current context.
void double_fail(const char* entry_point, uint64_t nth, Result result, int sticky) {
  Lock lock(world().mutex);
  world().failures.push_back({entry_point, nth, result, sticky != 0});
}

// The nth copy from now that was submitted through this entry point fails when it runs, for good.
void double_fail_async(const char* entry_point, uint64_t nth, Result result) {
  Lock lock(world().mutex);
  world().async_failures.push_back({entry_point, nth, result, true});
}

// A context as a lost device leaves it.
Result double_poison(int device, Result error) {
  Lock lock(world().mutex);
  Context* const context = context_at(device);
  if (context == nullptr) return kInvalidDevice;
  poison(*context, error);
  return kSuccess;
}

// A misuse to be caught: the entry point does nothing, successfully.
void double_ignore(const char* entry_point, int on) {
  Lock lock(world().mutex);
  if (on != 0) world().ignored.insert(entry_point);
  else world().ignored.erase(entry_point);
}

// A driver that takes its time, as with a full launch queue: calls of the entry point stand still.
void double_stall(const char* entry_point, int on) {
  Lock lock(world().mutex);
  if (on != 0) world().stalled.insert(entry_point);
  else world().stalled.erase(entry_point);
  announce();
}

int double_wait_stalled(int count, unsigned timeout_ms) {
  World& w = world();
  Lock lock(w.mutex);
  return w.changed.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                            [&] { return w.stalling >= count; });
}

// A link as slow as the test likes: copies to the host stand still before their first byte.
void double_hold_copies(void) {
  Lock lock(world().mutex);
  world().holding = true;
}

void double_release_copies(void) {
  Lock lock(world().mutex);
  world().holding = false;
  announce();
}

int double_copies_held(void) {
  Lock lock(world().mutex);
  return world().held;
}

int double_wait_copies_held(int count, unsigned timeout_ms) {
  World& w = world();
  Lock lock(w.mutex);
  return w.changed.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                            [&] { return w.held >= count; });
}

uint64_t double_copied_nbytes(int to_host) {
  Lock lock(world().mutex);
  return to_host != 0 ? world().bytes_to_host : world().bytes_to_device;
}

uint64_t double_count(const char* entry_point) {
  Lock lock(world().mutex);
  const auto found = world().calls.find(entry_point);
  return found == world().calls.end() ? 0 : found->second;
}

// "pageable", "spinning_waits", "blocking_streams", "unregistered_in_use", "deadlocks", "captured".
uint64_t double_counter(const char* name) {
  Lock lock(world().mutex);
  const auto found = world().counters.find(name);
  return found == world().counters.end() ? 0 : found->second;
}

uint64_t double_registered_nbytes(void) {
  Lock lock(world().mutex);
  uint64_t nbytes = 0;
  for (const auto& [address, range] : world().pinned) nbytes += range.nbytes;
  return nbytes;
}

int double_registered_flags(const void* memory) {  // of the range that begins there; -1: none does
  Lock lock(world().mutex);
  const auto found = world().pinned.find(reinterpret_cast<uintptr_t>(memory));
  return found == world().pinned.end() ? -1 : static_cast<int>(found->second.flags);
}

uint64_t double_live_nbytes(int device) {  // of device memory
  Lock lock(world().mutex);
  Context* const context = context_at(device);
  uint64_t nbytes = 0;
  if (context != nullptr)
    for (const auto& [offset, size] : context->live) nbytes += size;
  return nbytes;
}

// The latest calls that fit, "name thread" per line, oldest first. Returns the bytes written.
size_t double_log(char* buffer, size_t size) {
  Lock lock(world().mutex);
  const auto& log = world().log;
  size_t first = log.size(), nbytes = 0;
  while (first > 0 && nbytes + log[first - 1].size() + 1 <= size) nbytes += log[--first].size() + 1;
  for (char* at = buffer; first < log.size(); ++first) {
    at = std::copy(log[first].begin(), log[first].end(), at);
    *at++ = '\n';
  }
  return nbytes;
}

void double_clear_log(void) {
  Lock lock(world().mutex);
  world().log.clear();
}

int double_thread_number(void) { return this_thread(); }  // as it stands in the log

}  // extern "C"
