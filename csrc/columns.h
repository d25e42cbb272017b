// Thousands of objects and their dictionaries, read at once. Lists that are handed over must be the caller's own.
#pragma once

#include <nanobind/nanobind.h>

namespace asyncckpt {

// Dictionaries that each of some objects has, as columns. See asyncckpt/_native.pyi.
nanobind::object columns(nanobind::list objects, nanobind::tuple names, nanobind::tuple absent,
                         nanobind::tuple empty);

// What is in many dictionaries. See asyncckpt/_native.pyi.
nanobind::object entries_of(nanobind::list dicts, nanobind::handle kind);

// What tells objects apart while they are alive. See asyncckpt/_native.pyi.
nanobind::bytes identities(nanobind::list objects);

}  // namespace asyncckpt
