// The writing engine: jobs of file images, streamed through a bounded ring of chunks to disk.
//
// Guarantees
//   - A chunk is the bytes of the file at its own offset; its CRC-32 is that of the bytes written. Where
//     others write to the same file, what lies between this job's bytes is left to them.
//   - Chunks are granted first-come by job: a later job gets none until an earlier one has claimed
//     all of its own, so two jobs in flight cannot starve each other.
//   - `enqueued` comes when every source in host memory was read, and the copies of all others are on
//     the way: a device stream that waits for them may then change those. `released` comes when no
//     source will be read again, whether the job succeeds or fails; `finished` when no thread works
//     for the job any more, all its data synced if it succeeded.
//   - A job that fails keeps its first error and stops early. The engine goes on with the others.
//   - Memory: the arena and nothing that grows with the state.
//   - A chunk into which a device may still be copying serves nobody else. Where the driver refuses to say
//     when it has ended, the chunk is lost for good, and the arena stays mapped and pinned for as long as
//     the process lives. (Its job has failed; what the device still reads for it comes to nothing.)
//
// Threads: copiers fill chunks and do nothing else, since that is what training waits for: bytes of
// the host they copy, and checksum them on the way where that is nearly free; copies from devices they
// enqueue, chunk by chunk. One thread sleeps until the devices are done with a chunk. Writers put the
// literals into the filled ones, checksum what is not yet, seal chunks in file order (fix-ups, CRCs that
// need earlier ones), write them and sync the files; they run at a lower priority, so that on few cores
// copying goes first.
//
// This file knows files, extents and addresses, and nothing of Python or torch.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sys/types.h>

#include "arena.h"
#include "crc32.h"
#include "device.h"
#include "file.h"
#include "host_copy.h"
#include "image.h"

namespace asyncckpt {

constexpr int32_t kNoSlab = -1;
constexpr double kForever_s = 1e8;  // clocks overflow far beyond

// Sources of one slab lie in one allocation of a device, and whatever lies between two of them may be
// read too. Where they are as far apart as in the file, with nothing but literals between, one copy
// brings them all; the literals take their places afterwards.
struct Source {
  uint64_t address;
  uint64_t nbytes;
  int device = kHost;  // or a CUDA ordinal
  int32_t slab = kNoSlab;
};

struct JobError {
  std::string operation;  // "pwrite", "copy", ...
  std::string path;
  int64_t offset = -1;   // in the file; -1 when it does not apply
  int64_t source = -1;   // whose bytes could not be read; -1 when it does not apply
  int error_number = 0;  // 0 when there is no error, or when it is a device's
  std::string reason;    // what the device's driver says

  explicit operator bool() const { return !operation.empty(); }
};

struct JobTimes {  // seconds since submit(); negative when it has not happened
  double enqueued_s = -1;
  double released_s = -1;
  double written_s = -1;   // last byte handed to the kernel
  double finished_s = -1;  // last file synced
  double starved_s = 0;    // a copier's wait for a free chunk, on average: the disk's backpressure
};

class Engine;

class Job {
 public:
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  // Each waits until the phase is reached or the time is up; true when it was reached.
  bool wait_enqueued(double timeout_s);
  bool wait_released(double timeout_s);
  bool wait_finished(double timeout_s);

  // Makes the stream's later work wait for the job's copies from its device, not this thread. To be
  // called once enqueued.
  DeviceFailure hold_back(CallerStream stream);

  // Gives the job up: it fails with operation "abort" unless it has finished or failed before.
  void abort();

  bool released() const { return released_; }
  bool finished() const { return finished_; }
  JobError error();
  JobTimes times();
  bool direct();  // whether every file was written with O_DIRECT

  // A run of bytes that was written, from one chunk. Chunks of a whole file have one each.
  struct Run {
    uint64_t offset;  // in the file
    uint64_t nbytes;
    uint32_t crc;
  };

  // Valid once finished without error.
  const std::vector<Run>& runs(size_t file) const { return files_[file]->runs; }
  const std::vector<uint32_t>& record_crcs(size_t file) const { return files_[file]->record_crcs; }
  size_t files() const { return files_.size(); }
  const FileImage& image(size_t file) const { return *files_[file]->image; }

 private:
  friend class Engine;

  struct Piece {  // a run of bytes in a chunk that belongs to one extent
    size_t offset_in_chunk;
    size_t nbytes;
    int64_t record;
    uint64_t literal_offset;      // where a literal's bytes are in the image's literals
    std::optional<uint32_t> crc;  // once known; literals are checksummed when the chunk is sealed
  };
  struct Chunk {
    size_t file;
    uint64_t number;  // of those that the image has bytes in
    uint64_t offset;  // in the file
    size_t buffer;    // in the arena
    size_t nbytes;
    std::vector<Piece> pieces;
    std::vector<Run> runs;                                 // once sealed
    std::vector<std::pair<Device*, cuda::Event>> copying;  // until these have happened
    bool in_doubt = false;  // copies may be under way whose end nothing tells
  };
  struct DeviceUse {
    Device* device;
    cuda::Event caller_done = nullptr;  // what the caller had enqueued at submit()
    cuda::Event copies_done = nullptr;  // recorded behind the last copy, once enqueued
  };
  struct FileState {
    std::shared_ptr<const FileImage> image;
    std::string path;
    File file;
    std::mutex opening;  // the first writer that comes opens the file, the others wait here
    bool was_opened = false;
    int open_error = 0;
    const char* open_operation = "";
    uint64_t chunks = 0;               // a file of no bytes still has one chunk, of no bytes
    std::vector<uint64_t> of_partial;  // of a partial image: where its chunks are, in chunks
    uint64_t claimed = 0;
    uint64_t sealed = 0;
    uint64_t written = 0;
    bool sealing = false;                         // one thread at a time seals a file
    std::deque<std::unique_ptr<Chunk>> unsealed;  // checksummed, waiting for an earlier one; sorted
    std::vector<Run> runs;
    std::vector<uint32_t> record_crcs;
  };

  Job(Engine* engine, std::string directory, std::vector<std::shared_ptr<const FileImage>> images,
      std::vector<Source> sources, size_t chunk_nbytes);
  void give_events_back();

  Engine* engine_;
  std::vector<Source> sources_;
  std::vector<std::unique_ptr<FileState>> files_;
  std::vector<DeviceUse> devices_;
  std::once_flag ordered_;  // our copies behind the caller's work
  // All below is guarded by Engine::mutex_, under which no driver is called: that may take long, and
  // Python asks for what is here.
  size_t claiming_file_ = 0;
  size_t outstanding_chunks_ = 0;  // claimed and not yet given back
  size_t enqueuing_ = 0;           // claimed, and a copier is still at it
  size_t filling_ = 0;             // claimed, and copies are still under way
  size_t unfinished_files_ = 0;
  size_t holding_back_ = 0;  // calls of hold_back() that use the events
  bool all_claimed_ = false;
  bool failed_ = false;
  bool enqueued_ = false;
  std::atomic<bool> released_{false};  // written under the mutex, read also without
  std::atomic<bool> finished_{false};  // the same
  bool direct_ = true;
  JobError error_;
  JobTimes times_;
  double submitted_s_ = 0;
};

struct EngineOptions {
  size_t arena_nbytes = size_t{1} << 30;  // rounded down to whole chunks, at least one
  size_t chunk_nbytes = size_t{4} << 20;  // also the size of a CRC block; a multiple of 4096
  unsigned copiers = 1;
  unsigned writers = 4;
  bool yielding = false;  // writers wait for all others: nice 19, lowest I/O priority but idle
  bool direct = true;     // try O_DIRECT
  bool copiers_checksum = crc32_goes_along();
  bool prefault = true;                 // make the arena's pages present in the background
  std::string driver = "libcuda.so.1";  // loaded when a device is first used
};

class Engine {
 public:
  explicit Engine(const EngineOptions& options);
  // As close(), however long that takes. Not to be run in a forked child, nor where close() gave up:
  // leak it there.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Gets ready for sources on a device: pins the arena, in the background, if no other device has
  // asked for that. Throws DeviceError. Idempotent.
  void use_device(int ordinal);

  // Sources must stay readable until the job is released; those on devices are read as they are once
  // the caller's stream of that device, of which there must be one, has done what it has now.
  // A slab is all on one device. `directory` must exist, the files must not. Throws DeviceError.
  std::shared_ptr<Job> submit(std::string directory,
                              std::vector<std::shared_ptr<const FileImage>> images,
                              std::vector<Source> sources,
                              const std::vector<CallerStream>& streams = {});

  // Aborts what is in flight, so that every job finishes, and joins the threads. False when that takes
  // too long, as where a device hangs: then threads, arena and engine must be left as they are, which a
  // later call may find ended after all. Idempotent.
  bool close(double timeout_s);

  bool forked() const;  // true in a child of the process that made the engine: it has no threads
  size_t arena_nbytes() const { return arena_.nbytes(); }
  size_t chunk_nbytes() const { return arena_.chunk_nbytes(); }
  double prefault_s() const { return prefault_s_; }  // negative until done
  double pin_s() const { return pin_s_; }            // the same
  DeviceFailure pin_failure();                       // why part of the arena is not pinned
  DeviceFailure batch_failure();                     // of the first device that refused: see Device

 private:
  friend class Job;
  using JobPtr = std::shared_ptr<Job>;
  struct Task {
    JobPtr job;
    std::unique_ptr<Job::Chunk> chunk;
  };

  struct Filling;

  template <typename Body>
  void start(Body body);
  void copy_loop(unsigned copier);
  void complete_loop();
  void write_loop();
  void pin_arena(Device& device);
  size_t take_buffer(const Job& job);
  void fill(Job& job, Job::Chunk& chunk, Filling& filling, unsigned copier);
  void enqueue(Job& job, Job::Chunk& chunk, Filling& filling);
  void order_after_caller(Job& job, Filling& filling);
  void record_last_copies(Job& job, Filling& filling);
  void filled(const JobPtr& job, std::unique_ptr<Job::Chunk> chunk);
  void checksum(Task task, std::unique_lock<std::mutex>& lock);
  void seal_ready(const JobPtr& job, size_t file, std::unique_lock<std::mutex>& lock);
  void seal(Job::FileState& file, Job::Chunk& chunk);
  void write_out(Task task, std::unique_lock<std::mutex>& lock);
  int write(Job& job, Job::Chunk& chunk, std::string* operation, uint64_t* offset);
  // The rest expects mutex_ to be held.
  void fail(Job& job, JobError error);
  void give_back(Job& job, std::unique_ptr<Job::Chunk> chunk);
  void lose(Job& job);
  void advance(Job& job);

  Arena arena_;
  const bool direct_;
  const std::string driver_;
  const unsigned copiers_;
  HostCopies host_copies_;  // one thread each
  const bool yielding_;
  const pid_t owner_;
  std::mutex mutex_;
  std::condition_variable work_for_copiers_;
  std::condition_variable work_for_completer_;
  std::condition_variable work_for_writers_;
  std::condition_variable phase_changed_;
  std::condition_variable thread_ended_;
  std::deque<JobPtr> to_fill_;
  std::deque<Task> to_complete_;
  std::deque<Task> to_checksum_;
  std::deque<Task> to_write_;
  std::vector<size_t> free_buffers_;
  size_t lost_chunks_ = 0;  // that a device may be writing to, for all we will ever know
  std::vector<JobPtr> unfinished_;
  std::vector<Device*> devices_;
  size_t pinned_chunks_ = 0;  // from the first; all of them once pinning has ended, however it did
  DeviceFailure pin_failure_;
  bool stopping_ = false;
  std::atomic<bool> stop_prefault_{false};
  std::atomic<double> prefault_s_{-1};
  std::atomic<double> pin_s_{-1};
  std::vector<std::thread> threads_;
  size_t ended_threads_ = 0;
};

}  // namespace asyncckpt
