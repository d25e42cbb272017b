// Thousands of Python objects asked at once. Besides bindings.cpp, what knows Python; the GIL is let go of inside
// torch's own functions alone. Lists that are handed over must be the caller's own.
#pragma once

#include <nanobind/nanobind.h>

namespace asyncckpt {

// Where tensors are, what they are and whether they were written to. See asyncckpt/_native.pyi.
nanobind::object survey(nanobind::list tensors, nanobind::tuple kinds, nanobind::handle capsule,
                        bool with_forms, bool with_storages);

// Dictionaries that each of some objects has, as columns. See asyncckpt/_native.pyi.
nanobind::object columns(nanobind::list objects, nanobind::tuple names, nanobind::tuple absent,
                         nanobind::tuple empty);

}  // namespace asyncckpt
