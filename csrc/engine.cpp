#include "engine.h"

#include <errno.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "crc32.h"
#include "device.h"
#include "faults.h"
#include "threads.h"

namespace asyncckpt {
namespace {

// Added to the nice value of the writers, so that they stand back on a machine with too few cores.
constexpr int kWritersNice = 5;
constexpr int kNiceMax = 19;

// Of ioprio_set(2), which glibc leaves to its callers. Not the idle class: behind somebody else's steady
// reads it would never get to write.
constexpr int kIoprioOfThread = 1;                    // IOPRIO_WHO_PROCESS
constexpr int kIoprioBestEffortLowest = 2 << 13 | 7;  // IOPRIO_CLASS_BE, level 7

// On Linux both are a thread's own. Refused or not, all stays correct.
void stand_back(bool yielding) {
  const int nice = yielding ? kNiceMax : ::getpriority(PRIO_PROCESS, 0) + kWritersNice;
  ::setpriority(PRIO_PROCESS, 0, nice);
  if (yielding) ::syscall(SYS_ioprio_set, kIoprioOfThread, 0, kIoprioBestEffortLowest);
}

DeviceFailure all_lost() {
  return {"staging", "devices refused to say when they are done with any of this memory"};
}

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

// ---- Job ---------------------------------------------------------------------------------------

Job::Job(Engine* engine, std::string directory,
         std::vector<std::shared_ptr<const FileImage>> images, std::vector<Source> sources,
         size_t chunk_nbytes)
    : engine_(engine), sources_(std::move(sources)), submitted_s_(now_s()) {
  for (auto& image : images) {
    auto file = std::make_unique<FileState>();
    file->path = directory + "/" + image->path;
    if (image->partial) {
      for (const Extent& extent : image->extents) {
        const uint64_t last = (extent.offset + extent.nbytes - 1) / chunk_nbytes;
        uint64_t chunk = extent.offset / chunk_nbytes;
        if (!file->of_partial.empty()) chunk = std::max(chunk, file->of_partial.back() + 1);
        for (; chunk <= last; ++chunk) file->of_partial.push_back(chunk);
      }
      file->chunks = file->of_partial.size();
    } else {
      file->chunks = std::max<uint64_t>(1, (image->nbytes + chunk_nbytes - 1) / chunk_nbytes);
    }
    file->runs.reserve(file->chunks);
    file->record_crcs.assign(image->records, 0);
    file->image = std::move(image);
    files_.push_back(std::move(file));
  }
  unfinished_files_ = files_.size();
  all_claimed_ = files_.empty();
}

bool Job::wait_enqueued(double timeout_s) {
  std::unique_lock<std::mutex> lock(engine_->mutex_);
  return engine_->phase_changed_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                                          [&] { return enqueued_; });
}

bool Job::wait_released(double timeout_s) {
  std::unique_lock<std::mutex> lock(engine_->mutex_);
  return engine_->phase_changed_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                                          [&] { return released(); });
}

bool Job::wait_finished(double timeout_s) {
  std::unique_lock<std::mutex> lock(engine_->mutex_);
  return engine_->phase_changed_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                                          [&] { return finished(); });
}

void Job::abort() {
  std::lock_guard<std::mutex> lock(engine_->mutex_);
  if (!finished_) engine_->fail(*this, {"abort", "", -1, -1, ECANCELED, ""});
}

JobError Job::error() {
  std::lock_guard<std::mutex> lock(engine_->mutex_);
  return error_;
}

JobTimes Job::times() {
  std::lock_guard<std::mutex> lock(engine_->mutex_);
  return times_;
}

bool Job::direct() {
  std::lock_guard<std::mutex> lock(engine_->mutex_);
  return direct_;
}

DeviceFailure Job::hold_back(CallerStream stream) {
  std::unique_lock<std::mutex> lock(engine_->mutex_);
  if (!enqueued_) return {"hold_back", "the copies are not enqueued yet"};
  if (released_) return {};  // and its events may serve others already
  ++holding_back_;
  lock.unlock();
  DeviceFailure failure;
  for (const DeviceUse& use : devices_)
    if (use.device->ordinal() == stream.device && use.copies_done != nullptr)
      failure = use.device->make_wait(stream.handle, use.copies_done);
  lock.lock();
  if (--holding_back_ == 0 && released_) give_events_back();
  return failure;
}

// What waits for them goes on waiting: an event's later records don't matter to it.
void Job::give_events_back() {
  for (DeviceUse& use : devices_) {
    use.device->give_back(std::exchange(use.caller_done, nullptr));
    use.device->give_back(std::exchange(use.copies_done, nullptr));
  }
}

// ---- Engine: construction, submission, end -----------------------------------------------------

// The last thing a thread does is to say so: joining it takes no time then.
template <typename Body>
void Engine::start(Body body) {
  start_thread(threads_, [this, body] {
    body();
    std::lock_guard<std::mutex> lock(mutex_);
    ++ended_threads_;
    thread_ended_.notify_all();
  });
}

Engine::Engine(const EngineOptions& options)
    : arena_(std::max<size_t>(1, options.arena_nbytes / options.chunk_nbytes),
             options.chunk_nbytes),
      direct_(options.direct),
      driver_(options.driver),
      copiers_(std::max(1u, options.copiers)),
      host_copies_(copiers_, options.copiers_checksum),
      yielding_(options.yielding),
      owner_(::getpid()) {
  for (size_t index = arena_.chunks(); index-- > 0;) free_buffers_.push_back(index);
  // Should a thread not be had (a limit on processes), the others must be joined before they are
  // destroyed: else the program ends.
  try {
    for (unsigned i = 0; i < copiers_; ++i) start([this, i] { copy_loop(i); });
    for (unsigned i = 0; i < std::max(1u, options.writers); ++i) start([this] { write_loop(); });
    if (options.prefault)
      start([this] {
        const double begin_s = now_s();
        arena_.prefault(stop_prefault_);
        prefault_s_ = now_s() - begin_s;
      });
  } catch (...) {
    close(kForever_s);
    throw;
  }
}

Engine::~Engine() { close(kForever_s); }

bool Engine::close(double timeout_s) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    stopping_ = true;
    stop_prefault_ = true;
    for (const JobPtr& job : std::vector<JobPtr>(unfinished_))
      fail(*job, {"abort", "", -1, -1, ECANCELED, ""});
    work_for_copiers_.notify_all();
    work_for_completer_.notify_all();
    work_for_writers_.notify_all();
    if (!thread_ended_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                                [&] { return ended_threads_ == threads_.size(); }))
      return false;
  }
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  ended_threads_ = 0;
  if (lost_chunks_ > 0) arena_.abandon();
  else arena_.release();
  return true;
}

bool Engine::forked() const { return ::getpid() != owner_; }

void Engine::use_device(int ordinal) {
  const auto is_it = [&](const Device* device) { return device->ordinal() == ordinal; };
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (std::any_of(devices_.begin(), devices_.end(), is_it)) return;
  }
  DeviceFailure failure;
  Device* const device = Device::get(driver_, ordinal, &failure);
  if (device == nullptr) throw DeviceError(failure);
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) throw std::runtime_error("the engine is closed");
  if (devices_.empty()) {
    try {
      start([this] { complete_loop(); });
    } catch (const std::system_error& error) {
      throw DeviceError({"starting a thread", error.what()});
    }
    try {
      start([this, device] { pin_arena(*device); });
    } catch (const std::system_error& error) {
      pinned_chunks_ = arena_.chunks();
      pin_failure_ = {"starting a thread", error.what()};
    }
  }
  devices_.push_back(device);
}

void Engine::pin_arena(Device& device) {
  const double begin_s = now_s();
  DeviceFailure failure = arena_.pin(device, stop_prefault_, [this](size_t chunks) {
    std::lock_guard<std::mutex> lock(mutex_);
    pinned_chunks_ = chunks;
    work_for_copiers_.notify_all();
  });
  pin_s_ = now_s() - begin_s;
  std::lock_guard<std::mutex> lock(mutex_);
  pinned_chunks_ = arena_.chunks();
  pin_failure_ = std::move(failure);
  work_for_copiers_.notify_all();
}

DeviceFailure Engine::pin_failure() {
  std::lock_guard<std::mutex> lock(mutex_);
  return pin_failure_;
}

DeviceFailure Engine::batch_failure() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Device* device : devices_)
    if (DeviceFailure failure = device->batch_failure()) return failure;
  return {};
}

std::shared_ptr<Job> Engine::submit(std::string directory,
                                    std::vector<std::shared_ptr<const FileImage>> images,
                                    std::vector<Source> sources,
                                    const std::vector<CallerStream>& streams) {
  for (const auto& image : images)
    for (const Extent& extent : image->extents) {
      if (extent.source == kLiteral) continue;
      const auto source = static_cast<size_t>(extent.source);
      if (source >= sources.size() || extent.source_offset > sources[source].nbytes ||
          extent.nbytes > sources[source].nbytes - extent.source_offset)
        throw std::invalid_argument(image->path + ": the extent at offset " +
                                    std::to_string(extent.offset) + " asks for " +
                                    std::to_string(extent.nbytes) + " bytes that source " +
                                    std::to_string(source) + " does not have");
    }
  for (const Source& source : sources)
    if (source.device != kHost && std::none_of(streams.begin(), streams.end(), [&](auto& stream) {
          return stream.device == source.device;
        }))
      throw std::invalid_argument("no stream was given for device " +
                                  std::to_string(source.device));
  std::unordered_map<int32_t, int> device_of_slab;
  for (const Source& source : sources) {
    if (source.slab == kNoSlab) continue;
    const int device = device_of_slab.emplace(source.slab, source.device).first->second;
    if (source.device == kHost || source.device != device)
      throw std::invalid_argument("slab " + std::to_string(source.slab) + " is not on one device");
  }
  for (const CallerStream& stream : streams) use_device(stream.device);

  JobPtr job(new Job(this, std::move(directory), std::move(images), std::move(sources),
                     arena_.chunk_nbytes()));
  DeviceFailure failure;
  for (const CallerStream& stream : streams) {
    Device* const device = Device::get(driver_, stream.device, &failure);
    job->devices_.push_back({device});
    cuda::Event& caller_done = job->devices_.back().caller_done;
    failure = device->acquire(&caller_done);
    if (!failure) failure = device->record(stream.handle, caller_done);
    if (!failure) continue;
    job->give_events_back();
    throw DeviceError(failure);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) {
    job->give_events_back();
    throw std::runtime_error("the engine is closed");
  }
  if (lost_chunks_ == arena_.chunks()) {
    job->give_events_back();
    throw DeviceError(all_lost());
  }
  unfinished_.push_back(job);
  if (!job->all_claimed_) to_fill_.push_back(job);
  advance(*job);
  work_for_copiers_.notify_all();
  return job;
}

// ---- Engine: bookkeeping, mutex_ held ----------------------------------------------------------

void Engine::fail(Job& job, JobError error) {
  if (job.failed_ || job.finished_) return;
  job.failed_ = true;
  job.error_ = std::move(error);
  to_fill_.erase(std::remove_if(to_fill_.begin(), to_fill_.end(),
                                [&](const JobPtr& other) { return other.get() == &job; }),
                 to_fill_.end());
  for (auto& file : job.files_)
    while (!file->unsealed.empty()) {
      auto chunk = std::move(file->unsealed.front());
      file->unsealed.pop_front();
      give_back(job, std::move(chunk));
    }
  advance(job);
}

void Engine::give_back(Job& job, std::unique_ptr<Job::Chunk> chunk) {
  free_buffers_.push_back(chunk->buffer);
  --job.outstanding_chunks_;
  work_for_copiers_.notify_one();
}

// In place of giving back. Jobs that wait for a chunk are not left waiting for one that never comes.
void Engine::lose(Job& job) {
  --job.outstanding_chunks_;
  if (++lost_chunks_ < arena_.chunks()) return;
  const DeviceFailure why = all_lost();
  for (const JobPtr& other : std::deque<JobPtr>(to_fill_))
    fail(*other, {why.operation, "", -1, -1, 0, why.reason});
}

// Moves the job to the phases it has reached.
void Engine::advance(Job& job) {
  const bool no_more_claims = job.all_claimed_ || job.failed_;
  if (!job.enqueued_ && no_more_claims && job.enqueuing_ == 0) {
    job.enqueued_ = true;
    job.times_.enqueued_s = now_s() - job.submitted_s_;
    phase_changed_.notify_all();
  }
  if (!job.released_ && no_more_claims && job.filling_ == 0) {
    job.released_ = true;
    job.times_.released_s = now_s() - job.submitted_s_;
    if (job.holding_back_ == 0) job.give_events_back();
    phase_changed_.notify_all();
  }
  const bool done = job.failed_ ? job.released() : job.unfinished_files_ == 0;
  if (!job.finished_ && done && job.outstanding_chunks_ == 0) {
    job.finished_ = true;
    job.times_.finished_s = now_s() - job.submitted_s_;
    for (auto& file : job.files_) file->file.close();
    unfinished_.erase(std::find_if(unfinished_.begin(), unfinished_.end(),
                                   [&](const JobPtr& other) { return other.get() == &job; }));
    phase_changed_.notify_all();
    if (stopping_) {
      work_for_completer_.notify_all();
      work_for_writers_.notify_all();
    }
  }
}

// ---- Engine: filling ---------------------------------------------------------------------------

// What a copier found out about one chunk.
struct Engine::Filling {
  struct From {
    Device* device;
    std::vector<DeviceCopy> copies;
  };
  std::vector<From> from;  // one for each device of the job
  // The latest copy, while only literals came after it; what it reads belongs to this slab.
  std::vector<DeviceCopy>* open = nullptr;
  int32_t open_slab = kNoSlab;
  int64_t failed_source = -1;
  uint64_t failed_offset = 0;
  int error_number = 0;
  DeviceFailure device_failure;

  bool failed() const { return error_number != 0 || device_failure; }

  // Notes a copy; one that goes on where the latest would get to, becomes part of that one.
  void add(const Source& source, const DeviceCopy& copy) {
    if (open != nullptr && source.slab == open_slab) {
      DeviceCopy& latest = open->back();
      const auto advance = static_cast<uint64_t>(copy.host - latest.host);
      if (copy.address - latest.address == advance) {
        latest.nbytes = advance + copy.nbytes;
        return;
      }
    }
    for (From& one : from) {
      if (one.device->ordinal() != source.device) continue;
      one.copies.push_back(copy);
      open = source.slab == kNoSlab ? nullptr : &one.copies;
      open_slab = source.slab;
    }
  }
};

void Engine::copy_loop(unsigned copier) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (stopping_) return;
    if (to_fill_.empty()) {
      work_for_copiers_.wait(lock);
      continue;
    }
    const JobPtr job = to_fill_.front();
    const size_t buffer = take_buffer(*job);
    if (buffer == arena_.chunks()) {
      const bool starved = free_buffers_.empty();  // else what is free is not pinned yet
      const double begin_s = now_s();
      work_for_copiers_.wait(lock);
      // A copier may wake when others have copied all there was.
      const double end_s = job->released() ? job->submitted_s_ + job->times_.released_s : now_s();
      if (starved) job->times_.starved_s += std::max(0.0, end_s - begin_s) / copiers_;
      continue;
    }

    // Claim the next chunk, in file order.
    Job::FileState& file = *job->files_[job->claiming_file_];
    auto chunk = std::make_unique<Job::Chunk>();
    chunk->file = job->claiming_file_;
    chunk->number = file.claimed++;
    chunk->offset = arena_.chunk_nbytes() *
                    (file.image->partial ? file.of_partial[chunk->number] : chunk->number);
    chunk->nbytes = static_cast<size_t>(
        std::min<uint64_t>(arena_.chunk_nbytes(), file.image->nbytes - chunk->offset));
    chunk->buffer = buffer;
    ++job->outstanding_chunks_;
    ++job->enqueuing_;
    ++job->filling_;
    if (file.claimed == file.chunks && ++job->claiming_file_ == job->files_.size()) {
      job->all_claimed_ = true;
      to_fill_.pop_front();
    }

    lock.unlock();
    Filling filling;
    try {
      fill(*job, *chunk, filling, copier);
      enqueue(*job, *chunk, filling);
    } catch (const std::bad_alloc&) {
      filling.error_number = ENOMEM;
    }
    lock.lock();
    if (job->all_claimed_ && job->enqueuing_ == 1 && !job->devices_.empty()) {
      // No other copier is at this job, and none will be: the job stays not quite enqueued.
      lock.unlock();
      record_last_copies(*job, filling);
      lock.lock();
    }

    if (filling.failed())
      fail(*job, {filling.device_failure ? filling.device_failure.operation : "copy", file.path,
                  static_cast<int64_t>(filling.failed_offset), filling.failed_source,
                  filling.error_number, filling.device_failure.reason});
    --job->enqueuing_;
    if (chunk->copying.empty()) {
      filled(job, std::move(chunk));
    } else {
      to_complete_.push_back({job, std::move(chunk)});
      work_for_completer_.notify_one();
      advance(*job);
    }
  }
}

// A free chunk that the job can use; the number of chunks if there is none.
size_t Engine::take_buffer(const Job& job) {
  const size_t usable = job.devices_.empty() ? arena_.chunks() : pinned_chunks_;
  const auto found = std::find_if(free_buffers_.rbegin(), free_buffers_.rend(),
                                  [&](size_t buffer) { return buffer < usable; });
  if (found == free_buffers_.rend()) return arena_.chunks();
  const size_t buffer = *found;
  free_buffers_.erase(std::next(found).base());
  return buffer;
}

// Copies the host's sources, and notes what to copy from devices. Literals are left to the writers:
// nobody waits for them, and a copy may run over their place until then.
void Engine::fill(Job& job, Job::Chunk& chunk, Filling& filling, unsigned copier) {
  const FileImage& image = *job.files_[chunk.file]->image;
  char* const buffer = arena_.chunk(chunk.buffer);
  const uint64_t begin = chunk.offset;
  const uint64_t end = begin + chunk.nbytes;
  for (const Job::DeviceUse& use : job.devices_) filling.from.push_back({use.device, {}});
  struct Copied {
    size_t piece;
    int64_t source;
  };
  std::vector<HostCopy> copies;
  std::vector<Copied> copied;  // what each is
  auto extent = std::upper_bound(
      image.extents.begin(), image.extents.end(), begin,
      [](uint64_t offset, const Extent& e) { return offset < e.offset + e.nbytes; });
  const auto beyond =
      std::lower_bound(extent, image.extents.end(), end,
                       [](const Extent& e, uint64_t offset) { return e.offset < offset; });
  const auto pieces = static_cast<size_t>(beyond - extent);
  chunk.pieces.reserve(pieces);
  copies.reserve(pieces);
  copied.reserve(pieces);
  for (; extent != beyond; ++extent) {
    const uint64_t from = std::max(begin, extent->offset);
    const uint64_t to = std::min(end, extent->offset + extent->nbytes);
    const uint64_t source_offset = extent->source_offset + (from - extent->offset);
    Job::Piece piece{static_cast<size_t>(from - begin),
                     static_cast<size_t>(to - from),
                     extent->record,
                     source_offset,
                     {}};
    char* const target = buffer + piece.offset_in_chunk;
    if (extent->source != kLiteral && piece.nbytes > 0) {
      const Source& source = job.sources_[static_cast<size_t>(extent->source)];
      const uint64_t address = source.address + source_offset;
      if (source.device == kHost) {
        copies.push_back({target, address, piece.nbytes});
        copied.push_back({chunk.pieces.size(), extent->source});
        filling.open = nullptr;  // no copy may run over these bytes
      } else {
        filling.add(source, {target, address, piece.nbytes});
      }
    }
    chunk.pieces.push_back(piece);
  }
  size_t failed = 0;
  filling.error_number = host_copies_.copy(copier, copies, &failed);
  if (filling.error_number != 0) {
    filling.failed_source = copied[failed].source;
    filling.failed_offset = begin + chunk.pieces[copied[failed].piece].offset_in_chunk;
    filling.from.clear();
    return;
  }
  for (size_t index = 0; index < copies.size(); ++index)
    chunk.pieces[copied[index].piece].crc = copies[index].crc;
}

// Sends the copies from devices on their way, and notes in the chunk what tells their end.
void Engine::enqueue(Job& job, Job::Chunk& chunk, Filling& filling) {
  for (const Filling::From& from : filling.from) {
    if (from.copies.empty()) continue;
    std::call_once(job.ordered_, [&] { order_after_caller(job, filling); });
    if (filling.failed()) return;
    filling.error_number = faults::check(faults::Op::copy).error_number;
    if (filling.failed()) return;
    chunk.copying.reserve(filling.from.size());
    cuda::Event event = nullptr;
    DeviceFailure failure = from.device->acquire(&event);
    if (!failure) {
      chunk.in_doubt = true;
      failure = from.device->copy(Device::Way::to_host, from.copies);
      // Also after a failure: some copies may be under way, and the chunk is theirs until they end.
      const DeviceFailure unrecorded = from.device->record(Device::Way::to_host, event);
      if (unrecorded) {
        from.device->give_back(event);
      } else {
        chunk.copying.push_back({from.device, event});
        chunk.in_doubt = false;
      }
      if (!failure) failure = unrecorded;
    }
    if (failure) {
      filling.device_failure = std::move(failure);
      return;
    }
  }
}

void Engine::order_after_caller(Job& job, Filling& filling) {
  for (const Job::DeviceUse& use : job.devices_)
    if (DeviceFailure failure = use.device->order_after(Device::Way::to_host, use.caller_done))
      filling.device_failure = std::move(failure);
}

void Engine::record_last_copies(Job& job, Filling& filling) {
  for (Job::DeviceUse& use : job.devices_) {
    DeviceFailure failure = use.device->acquire(&use.copies_done);
    if (!failure) failure = use.device->record(Device::Way::to_host, use.copies_done);
    if (failure) filling.device_failure = std::move(failure);
  }
}

// Sleeps until the devices are done with a chunk, oldest first.
void Engine::complete_loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (to_complete_.empty()) {
      if (stopping_ && unfinished_.empty()) return;
      work_for_completer_.wait(lock);
      continue;
    }
    Task task = std::move(to_complete_.front());
    to_complete_.pop_front();
    lock.unlock();
    DeviceFailure failure;
    for (auto& [device, event] : task.chunk->copying) {
      if (DeviceFailure one = device->wait(event)) {
        task.chunk->in_doubt = true;
        failure = std::move(one);
      }
      device->give_back(event);
    }
    task.chunk->copying.clear();
    lock.lock();
    if (failure) {
      const std::string& path = task.job->files_[task.chunk->file]->path;
      fail(*task.job, {failure.operation, path, static_cast<int64_t>(task.chunk->offset), -1, 0,
                       failure.reason});
    }
    filled(task.job, std::move(task.chunk));
  }
}

// The chunk has all its bytes, or none will come any more. Expects mutex_ to be held.
void Engine::filled(const JobPtr& job, std::unique_ptr<Job::Chunk> chunk) {
  --job->filling_;
  if (chunk->in_doubt) {
    lose(*job);
  } else if (job->failed_) {
    give_back(*job, std::move(chunk));
  } else {
    to_checksum_.push_back({job, std::move(chunk)});
    work_for_writers_.notify_one();
  }
  advance(*job);
}

// ---- Engine: literals and checksums -------------------------------------------------------------

void Engine::checksum(Task task, std::unique_lock<std::mutex>& lock) {
  const JobPtr job = std::move(task.job);
  auto chunk = std::move(task.chunk);
  if (!job->failed_) {
    lock.unlock();
    const FileImage& image = *job->files_[chunk->file]->image;
    char* const buffer = arena_.chunk(chunk->buffer);
    for (Job::Piece& piece : chunk->pieces) {
      char* const bytes = buffer + piece.offset_in_chunk;
      if (piece.record == kNoRecord)
        std::memcpy(bytes, image.literals.data() + piece.literal_offset, piece.nbytes);
      else if (!piece.crc) piece.crc = crc32(0, bytes, piece.nbytes);
    }
    lock.lock();
  }
  if (job->failed_) {
    give_back(*job, std::move(chunk));
    advance(*job);
    return;
  }
  const size_t file_index = chunk->file;
  auto& unsealed = job->files_[file_index]->unsealed;
  const auto later = std::find_if(
      unsealed.begin(), unsealed.end(),
      [&](const std::unique_ptr<Job::Chunk>& other) { return other->number > chunk->number; });
  unsealed.insert(later, std::move(chunk));
  seal_ready(job, file_index, lock);
}

// Seals, in file order, every chunk of the file that can be sealed now, and hands it to the writers.
void Engine::seal_ready(const JobPtr& job, size_t file_index, std::unique_lock<std::mutex>& lock) {
  Job::FileState& file = *job->files_[file_index];
  if (file.sealing) return;  // that thread looks again before it leaves
  file.sealing = true;
  while (!job->failed_ && !file.unsealed.empty() && file.unsealed.front()->number == file.sealed) {
    auto chunk = std::move(file.unsealed.front());
    file.unsealed.pop_front();
    lock.unlock();
    seal(file, *chunk);
    lock.lock();
    ++file.sealed;
    if (job->failed_) {
      give_back(*job, std::move(chunk));
      advance(*job);
    } else {
      to_write_.push_back({job, std::move(chunk)});
      work_for_writers_.notify_one();
    }
  }
  file.sealing = false;
}

// Completes the bytes of a chunk and the CRCs that end in it. Earlier chunks of the file are sealed,
// so the CRC of every record that ends before a fix-up is known.
void Engine::seal(Job::FileState& file, Job::Chunk& chunk) {
  const FileImage& image = *file.image;
  char* const buffer = arena_.chunk(chunk.buffer);
  const uint64_t begin = chunk.offset;
  const uint64_t end = begin + chunk.nbytes;
  auto fixup =
      std::upper_bound(image.fixups.begin(), image.fixups.end(), begin,
                       [](uint64_t offset, const Fixup& f) { return offset < f.offset + 4; });
  for (Job::Piece& piece : chunk.pieces) {
    const uint64_t piece_begin = begin + piece.offset_in_chunk;
    const uint64_t piece_end = piece_begin + piece.nbytes;
    if (chunk.runs.empty() || chunk.runs.back().offset + chunk.runs.back().nbytes != piece_begin)
      chunk.runs.push_back({piece_begin, 0, 0});
    Job::Run& run = chunk.runs.back();
    run.nbytes += piece.nbytes;
    if (piece.record == kNoRecord) {
      // Patch before checksumming. A fix-up may begin in the chunk before or end in the next one.
      for (; fixup != image.fixups.end() && fixup->offset < piece_end; ++fixup) {
        const uint32_t crc = file.record_crcs[fixup->record];
        for (uint64_t byte = 0; byte < 4; ++byte) {
          const uint64_t offset = fixup->offset + byte;
          if (offset >= begin && offset < end)
            buffer[offset - begin] = static_cast<char>(crc >> (8 * byte));
        }
        if (fixup->offset + 4 > end) break;  // its rest is the next chunk's
      }
      run.crc = crc32(run.crc, buffer + piece.offset_in_chunk, piece.nbytes);
    } else {
      uint32_t& record_crc = file.record_crcs[static_cast<size_t>(piece.record)];
      record_crc = crc32_combine(record_crc, *piece.crc, piece.nbytes);
      run.crc = crc32_combine(run.crc, *piece.crc, piece.nbytes);
    }
  }
  file.runs.insert(file.runs.end(), chunk.runs.begin(), chunk.runs.end());
  const size_t padded_nbytes = round_up(chunk.nbytes, kDirectAlignment);
  std::memset(buffer + chunk.nbytes, 0, padded_nbytes - chunk.nbytes);
}

// ---- Engine: writing ---------------------------------------------------------------------------

void Engine::write_loop() {
  stand_back(yielding_);
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    // What can be written goes first: it keeps the disk busy and makes room.
    std::deque<Task>& queue = to_write_.empty() ? to_checksum_ : to_write_;
    if (queue.empty()) {
      if (stopping_ && unfinished_.empty()) return;
      work_for_writers_.wait(lock);
      continue;
    }
    const bool writable = &queue == &to_write_;
    Task task = std::move(queue.front());
    queue.pop_front();
    if (writable) write_out(std::move(task), lock);
    else checksum(std::move(task), lock);
  }
}

void Engine::write_out(Task task, std::unique_lock<std::mutex>& lock) {
  const JobPtr job = std::move(task.job);
  auto chunk = std::move(task.chunk);
  Job::FileState& file = *job->files_[chunk->file];
  std::string operation;
  uint64_t offset = 0;
  int error_number = 0;
  if (!job->failed_) {
    lock.unlock();
    error_number = write(*job, *chunk, &operation, &offset);
    lock.lock();
    if (error_number != 0)
      fail(*job, {operation, file.path, static_cast<int64_t>(offset), -1, error_number, ""});
  }
  const bool file_is_whole = !job->failed_ && ++file.written == file.chunks;
  if (!file_is_whole) {
    give_back(*job, std::move(chunk));
    advance(*job);
    return;
  }

  // The last chunk of the file: its memory is free for others while the file is synced, but it stays
  // outstanding, so that the job cannot finish under us.
  free_buffers_.push_back(chunk->buffer);
  work_for_copiers_.notify_one();
  job->times_.written_s = now_s() - job->submitted_s_;
  lock.unlock();
  const bool was_direct = file.file.direct();
  if (file.image->nbytes % kDirectAlignment != 0 && !file.image->partial) {
    operation = "ftruncate";
    error_number = file.file.truncate(file.image->nbytes);
  }
  if (error_number == 0) {
    operation = "fsync";
    error_number = file.file.sync();
  }
  lock.lock();
  --job->outstanding_chunks_;
  job->direct_ = job->direct_ && was_direct;
  if (error_number != 0) fail(*job, {operation, file.path, -1, -1, error_number, ""});
  else --job->unfinished_files_;
  advance(*job);
}

int Engine::write(Job& job, Job::Chunk& chunk, std::string* operation, uint64_t* offset) {
  Job::FileState& file = *job.files_[chunk.file];
  {
    std::lock_guard<std::mutex> lock(file.opening);
    if (!file.was_opened) {
      file.was_opened = true;
      file.open_error = file.file.create(file.path, file.image->nbytes, file.image->partial,
                                         direct_, &file.open_operation);
    }
    if (file.open_error != 0) {  // no second try: the job is failing already
      *operation = file.open_operation;
      return file.open_error;
    }
  }
  *operation = "pwrite";
  for (const Job::Run& run : chunk.runs) {
    size_t done = 0;
    const int error_number =
        file.file.write(arena_.chunk(chunk.buffer) + (run.offset - chunk.offset), run.nbytes,
                        round_up(run.nbytes, kDirectAlignment), run.offset, &done);
    *offset = run.offset + done;
    if (error_number != 0) return error_number;
  }
  return 0;
}

}  // namespace asyncckpt
