// Thousands of tensors asked at once. The GIL is let go of inside torch's own functions alone. The list that is handed
// over must be the caller's own.
#pragma once

#include <nanobind/nanobind.h>

namespace asyncckpt {

// Where tensors are, what they are and whether they were written to. See asyncckpt/_native.pyi.
nanobind::object survey(nanobind::list tensors, nanobind::tuple kinds, nanobind::handle capsule,
                        bool with_forms, bool with_storages, bool inside);

}  // namespace asyncckpt
