// A file as the engine sees it: extents, records, fix-ups. See asyncckpt/formats/image.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace asyncckpt {

constexpr int64_t kLiteral = -1;
constexpr int64_t kNoRecord = -1;

struct Extent {
  uint64_t offset;
  uint64_t nbytes;
  int64_t source;  // index into the job's sources, or kLiteral
  uint64_t source_offset;
  int64_t record;  // index, or kNoRecord
};

struct Fixup {
  uint64_t offset;
  uint32_t record;
};

struct FileImage {
  std::string path;      // relative to the job's directory
  uint64_t nbytes = 0;   // of the file
  bool partial = false;  // others write to the same file, at the same time
  std::string literals;
  std::vector<Extent> extents;
  std::vector<Fixup> fixups;
  uint32_t records = 0;

  // Empty when the image keeps its guarantees (extents tile the file, or, of a partial one, whole
  // blocks of it; fix-ups lie in literals and after their record); else what is wrong.
  std::string problem() const;
};

}  // namespace asyncckpt
