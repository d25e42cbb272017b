#include "engine.h"

#include <errno.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>

#include "crc32.h"
#include "device.h"
#include "threads.h"

namespace asyncckpt {
namespace {

// Added to the nice value of the writers.
constexpr int kWritersNice = 5;

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
    file->chunks = std::max<uint64_t>(1, (image->nbytes + chunk_nbytes - 1) / chunk_nbytes);
    file->block_crcs.reserve(file->chunks);
    file->record_crcs.assign(image->records, 0);
    file->image = std::move(image);
    files_.push_back(std::move(file));
  }
  unfinished_files_ = files_.size();
  all_claimed_ = files_.empty();
}

bool Job::wait_released(double timeout_s) {
  std::unique_lock<std::mutex> lock(engine_->mutex_);
  return engine_->phase_changed_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                                          [&] { return released_; });
}

bool Job::wait_finished(double timeout_s) {
  std::unique_lock<std::mutex> lock(engine_->mutex_);
  return engine_->phase_changed_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                                          [&] { return finished_; });
}

void Job::abort() {
  std::lock_guard<std::mutex> lock(engine_->mutex_);
  if (!finished_) engine_->fail(*this, {"abort", "", -1, -1, ECANCELED});
}

bool Job::released() {
  std::lock_guard<std::mutex> lock(engine_->mutex_);
  return released_;
}

bool Job::finished() {
  std::lock_guard<std::mutex> lock(engine_->mutex_);
  return finished_;
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

// ---- Engine: construction, submission, end -----------------------------------------------------

Engine::Engine(const EngineOptions& options)
    : arena_(std::max<size_t>(1, options.arena_nbytes / options.chunk_nbytes),
             options.chunk_nbytes),
      direct_(options.direct),
      owner_(::getpid()) {
  for (size_t index = arena_.chunks(); index-- > 0;) free_buffers_.push_back(index);
  // Should a thread not be had (a limit on processes), the others must be joined before they are
  // destroyed: else the program ends.
  try {
    for (unsigned i = 0; i < std::max(1u, options.copiers); ++i)
      start_thread(threads_, [this] { copy_loop(); });
    for (unsigned i = 0; i < std::max(1u, options.writers); ++i)
      start_thread(threads_, [this] { write_loop(); });
    if (options.prefault)
      start_thread(threads_, [this] {
        const double begin_s = now_s();
        arena_.prefault(stop_prefault_);
        prefault_s_ = now_s() - begin_s;
      });
  } catch (...) {
    close();
    throw;
  }
}

Engine::~Engine() { close(); }

void Engine::close() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    stop_prefault_ = true;
    for (const JobPtr& job : std::vector<JobPtr>(unfinished_))
      fail(*job, {"abort", "", -1, -1, ECANCELED});
    work_for_copiers_.notify_all();
    work_for_writers_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  arena_.release();
}

bool Engine::forked() const { return ::getpid() != owner_; }

std::shared_ptr<Job> Engine::submit(std::string directory,
                                    std::vector<std::shared_ptr<const FileImage>> images,
                                    std::vector<Source> sources) {
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
  JobPtr job(new Job(this, std::move(directory), std::move(images), std::move(sources),
                     arena_.chunk_nbytes()));
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) throw std::runtime_error("the engine is closed");
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

// Moves the job to the phases it has reached.
void Engine::advance(Job& job) {
  const bool no_more_claims = job.all_claimed_ || job.failed_;
  if (!job.released_ && no_more_claims && job.filling_ == 0) {
    job.released_ = true;
    job.times_.released_s = now_s() - job.submitted_s_;
    phase_changed_.notify_all();
  }
  const bool done = job.failed_ ? job.released_ : job.unfinished_files_ == 0;
  if (!job.finished_ && done && job.outstanding_chunks_ == 0) {
    job.finished_ = true;
    job.times_.finished_s = now_s() - job.submitted_s_;
    for (auto& file : job.files_) file->file.close();
    unfinished_.erase(std::find_if(unfinished_.begin(), unfinished_.end(),
                                   [&](const JobPtr& other) { return other.get() == &job; }));
    phase_changed_.notify_all();
    if (stopping_) work_for_writers_.notify_all();
  }
}

// ---- Engine: filling ---------------------------------------------------------------------------

void Engine::copy_loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (stopping_) return;
    if (to_fill_.empty()) {
      work_for_copiers_.wait(lock);
      continue;
    }
    const JobPtr job = to_fill_.front();
    if (free_buffers_.empty()) {
      const double begin_s = now_s();
      work_for_copiers_.wait(lock);
      job->times_.starved_s += now_s() - begin_s;
      continue;
    }

    // Claim the next chunk, in file order.
    Job::FileState& file = *job->files_[job->claiming_file_];
    auto chunk = std::make_unique<Job::Chunk>();
    chunk->file = job->claiming_file_;
    chunk->index = file.claimed++;
    chunk->nbytes = static_cast<size_t>(std::min<uint64_t>(
        arena_.chunk_nbytes(), file.image->nbytes - chunk->index * arena_.chunk_nbytes()));
    chunk->buffer = free_buffers_.back();
    free_buffers_.pop_back();
    ++job->outstanding_chunks_;
    ++job->filling_;
    if (file.claimed == file.chunks && ++job->claiming_file_ == job->files_.size()) {
      job->all_claimed_ = true;
      to_fill_.pop_front();
    }

    lock.unlock();
    int64_t failed_source = -1;
    uint64_t failed_offset = 0;
    int error_number = 0;
    try {
      error_number = fill(*job, *chunk, &failed_source, &failed_offset);
    } catch (const std::bad_alloc&) {
      error_number = ENOMEM;
    }
    lock.lock();

    --job->filling_;
    if (error_number != 0)
      fail(*job,
           {"copy", file.path, static_cast<int64_t>(failed_offset), failed_source, error_number});
    if (job->failed_) {
      give_back(*job, std::move(chunk));
    } else {
      to_checksum_.push_back({job, std::move(chunk)});
      work_for_writers_.notify_one();
    }
    advance(*job);
  }
}

int Engine::fill(Job& job, Job::Chunk& chunk, int64_t* failed_source, uint64_t* failed_offset) {
  const FileImage& image = *job.files_[chunk.file]->image;
  char* const buffer = arena_.chunk(chunk.buffer);
  const uint64_t begin = chunk.index * arena_.chunk_nbytes();
  const uint64_t end = begin + chunk.nbytes;
  auto extent = std::upper_bound(
      image.extents.begin(), image.extents.end(), begin,
      [](uint64_t offset, const Extent& e) { return offset < e.offset + e.nbytes; });
  for (; extent != image.extents.end() && extent->offset < end; ++extent) {
    const uint64_t from = std::max(begin, extent->offset);
    const uint64_t to = std::min(end, extent->offset + extent->nbytes);
    Job::Piece piece{static_cast<size_t>(from - begin), static_cast<size_t>(to - from),
                     extent->record, 0};
    const uint64_t source_offset = extent->source_offset + (from - extent->offset);
    if (extent->source == kLiteral) {
      std::memcpy(buffer + piece.offset_in_chunk, image.literals.data() + source_offset,
                  piece.nbytes);
    } else {
      const uint64_t address =
          job.sources_[static_cast<size_t>(extent->source)].address + source_offset;
      const int error_number =
          copy_from_host(buffer + piece.offset_in_chunk, address, piece.nbytes);
      if (error_number != 0) {
        *failed_source = extent->source;
        *failed_offset = from;
        return error_number;
      }
    }
    chunk.pieces.push_back(piece);
  }
  return 0;
}

// ---- Engine: checksums -------------------------------------------------------------------------

void Engine::checksum(Task task, std::unique_lock<std::mutex>& lock) {
  const JobPtr job = std::move(task.job);
  auto chunk = std::move(task.chunk);
  if (!job->failed_) {
    lock.unlock();
    const char* const buffer = arena_.chunk(chunk->buffer);
    for (Job::Piece& piece : chunk->pieces)
      if (piece.record != kNoRecord)
        piece.crc = crc32(0, buffer + piece.offset_in_chunk, piece.nbytes);
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
      [&](const std::unique_ptr<Job::Chunk>& other) { return other->index > chunk->index; });
  unsealed.insert(later, std::move(chunk));
  seal_ready(job, file_index, lock);
}

// Seals, in file order, every chunk of the file that can be sealed now, and hands it to the writers.
void Engine::seal_ready(const JobPtr& job, size_t file_index, std::unique_lock<std::mutex>& lock) {
  Job::FileState& file = *job->files_[file_index];
  if (file.sealing) return;  // that thread looks again before it leaves
  file.sealing = true;
  while (!job->failed_ && !file.unsealed.empty() && file.unsealed.front()->index == file.sealed) {
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
  const uint64_t begin = chunk.index * arena_.chunk_nbytes();
  const uint64_t end = begin + chunk.nbytes;
  auto fixup =
      std::upper_bound(image.fixups.begin(), image.fixups.end(), begin,
                       [](uint64_t offset, const Fixup& f) { return offset < f.offset + 4; });
  uint32_t block_crc = 0;
  for (Job::Piece& piece : chunk.pieces) {
    const uint64_t piece_end = begin + piece.offset_in_chunk + piece.nbytes;
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
      block_crc = crc32(block_crc, buffer + piece.offset_in_chunk, piece.nbytes);
    } else {
      uint32_t& record_crc = file.record_crcs[static_cast<size_t>(piece.record)];
      record_crc = crc32_combine(record_crc, piece.crc, piece.nbytes);
      block_crc = crc32_combine(block_crc, piece.crc, piece.nbytes);
    }
  }
  if (chunk.nbytes > 0) file.block_crcs.push_back(block_crc);
  const size_t padded_nbytes = round_up(chunk.nbytes, kDirectAlignment);
  std::memset(buffer + chunk.nbytes, 0, padded_nbytes - chunk.nbytes);
}

// ---- Engine: writing ---------------------------------------------------------------------------

void Engine::write_loop() {
  // On Linux the nice value is a thread's own. Refused or not, all stays correct.
  ::setpriority(PRIO_PROCESS, 0, ::getpriority(PRIO_PROCESS, 0) + kWritersNice);
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
      fail(*job, {operation, file.path, static_cast<int64_t>(offset), -1, error_number});
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
  if (file.image->nbytes % kDirectAlignment != 0) {
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
  if (error_number != 0) fail(*job, {operation, file.path, -1, -1, error_number});
  else --job->unfinished_files_;
  advance(*job);
}

int Engine::write(Job& job, Job::Chunk& chunk, std::string* operation, uint64_t* offset) {
  Job::FileState& file = *job.files_[chunk.file];
  {
    std::lock_guard<std::mutex> lock(file.opening);
    if (!file.was_opened) {
      file.was_opened = true;
      file.open_error =
          file.file.create(file.path, file.image->nbytes, direct_, &file.open_operation);
    }
    if (file.open_error != 0) {  // no second try: the job is failing already
      *operation = file.open_operation;
      return file.open_error;
    }
  }
  *operation = "pwrite";
  *offset = chunk.index * arena_.chunk_nbytes();
  size_t done = 0;
  const int error_number =
      file.file.write(arena_.chunk(chunk.buffer), chunk.nbytes,
                      round_up(chunk.nbytes, kDirectAlignment), *offset, &done);
  *offset += done;
  return error_number;
}

}  // namespace asyncckpt
