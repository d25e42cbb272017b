// Thousands of Python objects asked at once. Besides bindings.cpp, what knows Python; the GIL is held throughout.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace asyncckpt {

// Tensors of the last survey with forms, without holding them, and where they were: they were found to be no
// negation of what is in memory. To ask that, torch lets go of the GIL and takes it again for each.
class Known {
 public:
  bool has(size_t place, PyObject* tensor, uint64_t address) const;
  void note(size_t place, PyObject* tensor, uint64_t address);

 private:
  std::vector<std::pair<nanobind::object, uint64_t>> found_;  // weak references
};

// Where tensors are, what they are and whether they were written to. See asyncckpt/_native.pyi.
nanobind::object survey(nanobind::list tensors, nanobind::tuple types, nanobind::handle capsule,
                        bool with_forms, bool with_storages, Known* known);

// Dictionaries that each of some objects has, as columns. See asyncckpt/_native.pyi.
nanobind::object columns(nanobind::list objects, nanobind::tuple names, nanobind::tuple absent,
                         nanobind::tuple empty);

}  // namespace asyncckpt
