#include "image.h"

#include <algorithm>

#include "file.h"

namespace asyncckpt {

std::string FileImage::problem() const {
  uint64_t end = 0;
  std::vector<uint64_t> record_end(records, 0);
  for (const Extent& extent : extents) {
    const std::string where = path + ", extent at offset " + std::to_string(extent.offset);
    const bool leaps = partial && extent.offset > end && end % kDirectAlignment == 0 &&
                       extent.offset % kDirectAlignment == 0;
    if ((extent.offset != end && !leaps) || extent.nbytes == 0)
      return where + ": does not continue at " + std::to_string(end);
    end = extent.offset + extent.nbytes;
    if (extent.source == kLiteral) {
      if (extent.record != kNoRecord) return where + ": a literal belongs to no record";
      if (extent.source_offset > literals.size() ||
          extent.nbytes > literals.size() - extent.source_offset)
        return where + ": outside the literals";
    } else {
      if (extent.source < 0) return where + ": no such source";
      if (extent.record < 0 || static_cast<uint64_t>(extent.record) >= records)
        return where + ": no such record";
      record_end[static_cast<size_t>(extent.record)] = end;
    }
  }
  if (partial ? end > nbytes || end % kDirectAlignment != 0 : end != nbytes)
    return path + ": extents end at " + std::to_string(end);
  uint64_t last = 0;
  for (const Fixup& fixup : fixups) {
    const std::string where = path + ", fix-up at offset " + std::to_string(fixup.offset);
    if (fixup.record >= records) return where + ": no such record";
    if (fixup.offset < last || fixup.offset < record_end[fixup.record])
      return where + ": comes before what it depends on";
    last = fixup.offset + 4;
    const auto extent = std::upper_bound(
        extents.begin(), extents.end(), fixup.offset,
        [](uint64_t offset, const Extent& e) { return offset < e.offset + e.nbytes; });
    if (extent == extents.end() || extent->source != kLiteral ||
        fixup.offset + 4 > extent->offset + extent->nbytes)
      return where + ": not inside one literal";
  }
  return {};
}

}  // namespace asyncckpt
