// Where tensor bytes come from: the seam between the engine and memory that it does not own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace asyncckpt {

// Copies from memory of this process that its owner may free at any moment.
//
// Returns 0, or EFAULT when (part of) the source is no longer mapped; never faults. The copy goes
// through process_vm_writev(2): the kernel checks every page, at memcpy's speed (see
// docs/notes/2026-11-23-copying-from-memory-that-may-go-away.md). Where a sandbox forbids the call,
// a plain memcpy takes its place and copy_is_checked() tells.
int copy_from_host(void* target, uint64_t address, size_t nbytes);

bool copy_is_checked();

}  // namespace asyncckpt
