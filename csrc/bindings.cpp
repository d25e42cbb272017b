// What Python calls. Every wait releases the GIL and lets signals through.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "columns.h"
#include "crc32.h"
#include "device.h"
#include "device_crc.h"
#include "engine.h"
#include "faults.h"
#include "host_copy.h"
#include "image.h"
#include "reader.h"
#include "survey.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace asyncckpt;

namespace {

using Int64Table = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using UInt64Array = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Int32Array = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Streams = std::vector<std::pair<int, uint64_t>>;  // (device, the caller's stream there)

// A wait returns to Python this often, to run signal handlers.
constexpr double kSignalInterval_s = 0.1;

// What Python holds of an image. A shared_ptr made from a Python object would own a reference to it,
// and the engine thread that drops it last would wait for the GIL: native threads never call Python.
struct Image {
  std::shared_ptr<const FileImage> image;
};

template <typename Wait>
bool wait_interruptibly(double timeout_s, Wait&& wait) {
  for (;;) {
    bool reached;
    {
      nb::gil_scoped_release release;
      reached = wait(std::min(timeout_s, kSignalInterval_s));
    }
    if (reached) return true;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    timeout_s -= kSignalInterval_s;
    if (timeout_s <= 0) return false;
  }
}

Image make_image(const std::string& path, uint64_t nbytes, nb::bytes literals, Int64Table extents,
                 Int64Table fixups, uint32_t records, bool partial) {
  if (extents.shape(1) != 5 || fixups.shape(1) != 2)
    throw nb::value_error("extents must be [n, 5] and fixups [m, 2]");
  auto image = std::make_shared<FileImage>();
  image->path = path;
  image->nbytes = nbytes;
  image->partial = partial;
  image->literals.assign(literals.c_str(), literals.size());
  image->records = records;
  image->extents.reserve(extents.shape(0));
  for (size_t row = 0; row < extents.shape(0); ++row) {
    const int64_t* e = extents.data() + row * 5;
    if (e[0] < 0 || e[1] < 0 || e[3] < 0) throw nb::value_error("an extent has a negative field");
    image->extents.push_back({static_cast<uint64_t>(e[0]), static_cast<uint64_t>(e[1]), e[2],
                              static_cast<uint64_t>(e[3]), e[4]});
  }
  image->fixups.reserve(fixups.shape(0));
  for (size_t row = 0; row < fixups.shape(0); ++row) {
    const int64_t* f = fixups.data() + row * 2;
    if (f[0] < 0 || f[1] < 0) throw nb::value_error("a fix-up has a negative field");
    image->fixups.push_back({static_cast<uint64_t>(f[0]), static_cast<uint32_t>(f[1])});
  }
  const std::string problem = image->problem();
  if (!problem.empty()) throw nb::value_error(problem.c_str());
  return {std::move(image)};
}

// How long an engine that is dropped, not closed, may take to end.
constexpr double kDropPatience_s = 60;

// An engine that is abandoned, not destroyed, in a forked child: its threads are the parent's, so
// joining them would hang, and so would destroying condition variables that they wait for. The same where
// a thread of its own waits for a device that hangs.
struct EngineHandle {
  explicit EngineHandle(const EngineOptions& options) : engine(new Engine(options)) {}
  ~EngineHandle() {
    if (!engine->forked() && !abandoned && engine->close(kDropPatience_s)) delete engine;
  }
  EngineHandle(const EngineHandle&) = delete;
  EngineHandle& operator=(const EngineHandle&) = delete;

  Engine& usable() const {
    if (engine->forked()) throw std::runtime_error("the engine belongs to the parent process");
    return *engine;
  }

  Engine* const engine;
  bool abandoned = false;  // closing it took too long
};

std::vector<CallerStream> caller_streams(const Streams& streams) {
  std::vector<CallerStream> plain;
  for (const auto& [device, handle] : streams) plain.push_back({device, handle});
  return plain;
}

// What takes the engine's lock lets go of the GIL for it: that lock's holder may be waiting for a core.
template <typename Ask>
auto without_gil(Ask&& ask) {
  nb::gil_scoped_release release;
  return ask();
}

nb::tuple times_of(Job& job) {
  const JobTimes times = without_gil([&] { return job.times(); });
  return nb::make_tuple(times.enqueued_s, times.released_s, times.written_s, times.finished_s,
                        times.starved_s);
}

nb::object error_of(Job& job) {
  const JobError error = without_gil([&] { return job.error(); });
  if (!error) return nb::none();
  return nb::make_tuple(error.operation, error.path, error.offset, error.source, error.error_number,
                        error.reason);
}

nb::object error_of_reading(Reading& reading) {
  const ReadError error = reading.error();
  const char* kind = "";
  switch (error.kind) {
    case ReadError::Kind::none:
      return nb::none();
    case ReadError::Kind::os:
      kind = "os";
      break;
    case ReadError::Kind::size:
      kind = "size";
      break;
    case ReadError::Kind::crc:
      kind = "crc";
      break;
    case ReadError::Kind::device:
      kind = "device";
      break;
  }
  return nb::make_tuple(kind, error.operation, error.path, error.block, error.error_number,
                        error.expected, error.got, error.reason);
}

// A reading belongs to the process that began it; in a forked child its threads do not exist.
struct FileReads {
  std::vector<FileRead> files;

  void add(const std::string& path, uint64_t nbytes, uint64_t block_nbytes,
           std::vector<uint32_t> block_crcs, UInt64Array offsets, UInt64Array sizes,
           UInt64Array addresses, Int32Array devices, unsigned checkers, unsigned checker) {
    if (offsets.shape(0) != sizes.shape(0) || offsets.shape(0) != addresses.shape(0) ||
        offsets.shape(0) != devices.shape(0))
      throw nb::value_error("offsets, sizes, addresses and devices differ in length");
    FileRead file;
    file.path = path;
    file.nbytes = nbytes;
    file.block_nbytes = block_nbytes;
    file.block_crcs = std::move(block_crcs);
    file.checkers = checkers;
    file.checker = checker;
    for (size_t i = 0; i < offsets.shape(0); ++i)
      file.segments.push_back(
          {offsets.data()[i], sizes.data()[i], addresses.data()[i], devices.data()[i]});
    files.push_back(std::move(file));
  }
};

// A reading that began before it was known where the bytes go. In a forked child it is left alone: there
// are no threads to join.
struct EarlyReading {
  EarlyReading(const FileReads& reads, unsigned threads, bool direct)
      : reading(new Reading(reads.files, threads, direct, /*placed=*/false)) {}
  ~EarlyReading() { end(); }
  EarlyReading(const EarlyReading&) = delete;
  EarlyReading& operator=(const EarlyReading&) = delete;

  void end() {
    if (reading != nullptr && getpid() == owner) delete reading;
    reading = nullptr;
  }

  Reading* reading;
  const pid_t owner = getpid();
};

}  // namespace

NB_MODULE(_native, m) {
  // A checkpointer that lives in a global is alive when nanobind counts: that is no leak.
  nb::set_leak_warnings(false);
  m.doc() = "The native engine: file images to disk and back, without the GIL.";

  nb::exception<DeviceError>(m, "DeviceError", PyExc_RuntimeError);

  nb::class_<Image>(m, "Image")
      .def_prop_ro("path", [](const Image& image) { return image.image->path; })
      .def_prop_ro("nbytes", [](const Image& image) { return image.image->nbytes; });
  m.def("make_image", &make_image, "path"_a, "nbytes"_a, "literals"_a, "extents"_a, "fixups"_a,
        "records"_a, "partial"_a = false);

  nb::class_<Job>(m, "Job")
      .def(
          "wait_enqueued",
          [](Job& job, double timeout_s) {
            return wait_interruptibly(timeout_s, [&](double t) { return job.wait_enqueued(t); });
          },
          "timeout_s"_a = std::numeric_limits<double>::infinity())
      .def(
          "hold_back",
          [](Job& job, int device, uint64_t stream) {
            const DeviceFailure failure = job.hold_back({device, stream});
            if (failure) throw DeviceError(failure);
          },
          "device"_a, "stream"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "wait_released",
          [](Job& job, double timeout_s) {
            return wait_interruptibly(timeout_s, [&](double t) { return job.wait_released(t); });
          },
          "timeout_s"_a = std::numeric_limits<double>::infinity())
      .def(
          "wait_finished",
          [](Job& job, double timeout_s) {
            return wait_interruptibly(timeout_s, [&](double t) { return job.wait_finished(t); });
          },
          "timeout_s"_a = std::numeric_limits<double>::infinity())
      .def("abort", &Job::abort, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("released", &Job::released)
      .def_prop_ro("finished", &Job::finished)
      .def_prop_ro("direct", [](Job& job) { return without_gil([&] { return job.direct(); }); })
      .def_prop_ro("error", &error_of)
      .def_prop_ro("times_s", &times_of)
      .def("block_crcs",
           [](Job& job, size_t file) {
             if (file >= job.files()) throw nb::index_error();
             if (!job.finished()) throw std::runtime_error("the job has not finished");
             std::vector<uint32_t> crcs;
             for (const Job::Run& run : job.runs(file)) crcs.push_back(run.crc);
             return crcs;
           })
      .def("runs",
           [](Job& job, size_t file) {
             if (file >= job.files()) throw nb::index_error();
             if (!job.finished()) throw std::runtime_error("the job has not finished");
             std::vector<std::tuple<uint64_t, uint64_t, uint32_t>> runs;
             for (const Job::Run& run : job.runs(file))
               runs.emplace_back(run.offset, run.nbytes, run.crc);
             return runs;
           })
      .def("record_crcs", [](Job& job, size_t file) {
        if (file >= job.files()) throw nb::index_error();
        if (!job.finished()) throw std::runtime_error("the job has not finished");
        return job.record_crcs(file);
      });

  nb::class_<EngineHandle>(m, "Engine")
      .def(
          "__init__",
          [](EngineHandle* self, size_t arena_nbytes, size_t chunk_nbytes, unsigned copiers,
             unsigned writers, bool direct, bool prefault, std::string driver, bool yielding,
             std::optional<bool> copiers_checksum) {
            if (chunk_nbytes == 0 || chunk_nbytes % kDirectAlignment != 0)
              throw nb::value_error("chunk_nbytes must be a positive multiple of 4096");
            EngineOptions options;
            options.arena_nbytes = arena_nbytes;
            options.chunk_nbytes = chunk_nbytes;
            options.copiers = copiers;
            options.writers = writers;
            options.direct = direct;
            options.prefault = prefault;
            options.driver = std::move(driver);
            options.yielding = yielding;
            if (copiers_checksum) options.copiers_checksum = *copiers_checksum;
            new (self) EngineHandle(options);
          },
          nb::kw_only(), "arena_nbytes"_a, "chunk_nbytes"_a, "copiers"_a, "writers"_a, "direct"_a,
          "prefault"_a, "driver"_a = "libcuda.so.1", "yielding"_a = false,
          "copiers_checksum"_a = nb::none())
      .def(
          "use_device",
          [](EngineHandle& handle, int ordinal) {
            Engine& engine = handle.usable();
            nb::gil_scoped_release release;
            engine.use_device(ordinal);
          },
          "ordinal"_a)
      .def(
          "submit",
          [](EngineHandle& handle, std::string directory, const std::vector<Image>& images,
             UInt64Array addresses, UInt64Array sizes, Int32Array devices, const Streams& streams,
             std::optional<Int32Array> slabs) {
            Engine& engine = handle.usable();
            if (addresses.shape(0) != sizes.shape(0) || addresses.shape(0) != devices.shape(0) ||
                (slabs && addresses.shape(0) != slabs->shape(0)))
              throw nb::value_error("addresses, sizes, devices and slabs differ in length");
            std::vector<Source> sources(addresses.shape(0));
            for (size_t i = 0; i < sources.size(); ++i)
              sources[i] = {addresses.data()[i], sizes.data()[i], devices.data()[i],
                            slabs ? slabs->data()[i] : kNoSlab};
            std::vector<std::shared_ptr<const FileImage>> plain;
            for (const Image& image : images) plain.push_back(image.image);
            const std::vector<CallerStream> callers = caller_streams(streams);
            nb::gil_scoped_release release;
            return engine.submit(std::move(directory), std::move(plain), std::move(sources),
                                 callers);
          },
          "directory"_a, "images"_a, "addresses"_a, "sizes"_a, "devices"_a, "streams"_a = Streams(),
          "slabs"_a = nb::none(), nb::keep_alive<0, 1>())
      .def(
          "close",
          [](EngineHandle& handle, double timeout_s) {
            Engine& engine = handle.usable();
            nb::gil_scoped_release release;
            handle.abandoned = !engine.close(timeout_s);
            return !handle.abandoned;
          },
          "timeout_s"_a = kForever_s)
      .def_prop_ro("forked", [](EngineHandle& handle) { return handle.engine->forked(); })
      .def_prop_ro("arena_nbytes",
                   [](EngineHandle& handle) { return handle.engine->arena_nbytes(); })
      .def_prop_ro("chunk_nbytes",
                   [](EngineHandle& handle) { return handle.engine->chunk_nbytes(); })
      .def_prop_ro("prefault_s", [](EngineHandle& handle) { return handle.engine->prefault_s(); })
      .def_prop_ro("pin_s", [](EngineHandle& handle) { return handle.engine->pin_s(); })
      .def_prop_ro("pin_failure",
                   [](EngineHandle& handle) {
                     Engine& engine = handle.usable();
                     const DeviceFailure failure =
                         without_gil([&] { return engine.pin_failure(); });
                     return failure ? failure.operation + ": " + failure.reason : std::string();
                   })
      .def_prop_ro("batch_failure", [](EngineHandle& handle) {
        Engine& engine = handle.usable();
        const DeviceFailure failure = without_gil([&] { return engine.batch_failure(); });
        return failure ? failure.operation + ": " + failure.reason : std::string();
      });

  nb::class_<FileReads>(m, "FileReads")
      .def(nb::init<>())
      .def("add", &FileReads::add, "path"_a, "nbytes"_a, "block_nbytes"_a, "block_crcs"_a,
           "offsets"_a, "sizes"_a, "addresses"_a, "devices"_a, "checkers"_a = 1, "checker"_a = 0);
  m.def(
      "read_files",
      [](const FileReads& reads, unsigned threads, bool direct, const std::string& driver,
         const Streams& streams) {
        if (reads.files.empty()) return nb::object(nb::none());
        Reading reading(reads.files, threads, direct, /*placed=*/true, driver,
                        caller_streams(streams));
        wait_interruptibly(std::numeric_limits<double>::infinity(),
                           [&](double t) { return reading.wait(t); });
        return error_of_reading(reading);
      },
      "reads"_a, "threads"_a, "direct"_a, "driver"_a = "libcuda.so.1", "streams"_a = Streams());

  nb::class_<EarlyReading>(m, "EarlyReading")
      .def(nb::init<const FileReads&, unsigned, bool>(), "reads"_a, "threads"_a, "direct"_a)
      .def(
          "finish",
          [](EarlyReading& early, const FileReads& reads) {
            if (early.reading == nullptr || getpid() != early.owner)
              throw std::runtime_error("this reading has ended, or is the parent's");
            // It ends here, also if it is interrupted: the places are the caller's, and may go away.
            const std::unique_ptr<Reading> reading(std::exchange(early.reading, nullptr));
            reading->place(reads.files);
            wait_interruptibly(std::numeric_limits<double>::infinity(),
                               [&](double t) { return reading->wait(t); });
            return error_of_reading(*reading);
          },
          "reads"_a)
      .def("close", &EarlyReading::end, nb::call_guard<nb::gil_scoped_release>());

  m.def(
      "crc32",
      [](uint64_t address, uint64_t nbytes, uint32_t crc) {
        nb::gil_scoped_release release;
        return crc32(crc, reinterpret_cast<const void*>(static_cast<uintptr_t>(address)), nbytes);
      },
      "address"_a, "nbytes"_a, "crc"_a = 0);
  m.def(
      "crc32_copy",
      [](uint64_t to, uint64_t address, uint64_t nbytes, uint32_t crc) {
        nb::gil_scoped_release release;
        return crc32_copy(crc, reinterpret_cast<void*>(static_cast<uintptr_t>(to)),
                          reinterpret_cast<const void*>(static_cast<uintptr_t>(address)), nbytes);
      },
      "to"_a, "address"_a, "nbytes"_a, "crc"_a = 0);
  m.def(
      "device_crc32",
      [](const std::string& driver, int device, uint64_t stream, uint64_t address,
         uint64_t nbytes) {
        nb::gil_scoped_release release;
        DeviceFailure failure;
        Device* const opened = Device::get(driver, device, &failure);
        uint32_t crc = 0;
        if (opened != nullptr) failure = device_crc32(*opened, stream, address, nbytes, &crc);
        if (failure) throw DeviceError(failure);
        return crc;
      },
      "driver"_a, "device"_a, "stream"_a, "address"_a, "nbytes"_a);
  m.def(
      "crc32_portable",
      [](nb::bytes data, uint32_t crc) { return crc32_portable(crc, data.c_str(), data.size()); },
      "data"_a, "crc"_a = 0);
  m.def("crc32_combine", &crc32_combine, "crc_a"_a, "crc_b"_a, "nbytes_b"_a);
  m.def("crc32_kernel", &crc32_kernel);
  m.def("copy_is_checked", &HostCopies::is_checked);
  m.def("survey", &survey, "tensors"_a, "kinds"_a, "exchange_api"_a, "forms"_a = false,
        "storages"_a = false, "inside"_a = false);
  m.def("columns", &columns, "objects"_a, "names"_a, "absent"_a, "empty"_a);
  m.def("entries_of", &entries_of, "dicts"_a, "kind"_a);
  m.def("identities", &identities, "objects"_a);

  nb::module_ f = m.def_submodule("faults", "Faults on demand, for tests.");
  nb::enum_<faults::Op>(f, "Op")
      .value("open", faults::Op::open)
      .value("allocate", faults::Op::allocate)
      .value("pwrite", faults::Op::pwrite)
      .value("pread", faults::Op::pread)
      .value("fsync", faults::Op::fsync)
      .value("copy", faults::Op::copy);
  nb::enum_<faults::Kind>(f, "Kind")
      .value("error", faults::Kind::error)
      .value("shorten", faults::Kind::shorten)
      .value("kill", faults::Kind::kill)
      .value("pause", faults::Kind::pause);
  f.def("arm", &faults::arm, "op"_a, "nth"_a, "kind"_a, "error_number"_a = 0, "repeat"_a = false);
  f.def("disarm", &faults::disarm);
  f.def("resume", &faults::resume);
  f.def("hits", &faults::hits, "op"_a);
  f.def(
      "wait_for_hits",
      [](faults::Op op, uint64_t n, double timeout_s) {
        nb::gil_scoped_release release;
        return faults::wait_for_hits(op, n, timeout_s);
      },
      "op"_a, "n"_a, "timeout_s"_a = 30.0);
}
