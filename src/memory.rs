//! What this program asks of the system's allocator: to keep what it has. A delivery allocates and frees a buffer of up
//! to 256 KiB for every frame, and glibc as it starts gives such memory back to the system each time, only to have it
//! back page by page, zeroed: a sixth of a fetch's CPU time.

/// The largest block that glibc learns from (its `DEFAULT_MMAP_THRESHOLD_MAX` is 32 MiB, with its own header).
const LESSON: usize = 32 * 1024 * 1024 - 64 * 1024;

/// Allocates one large block and frees it, without touching it. glibc takes that as the size that this program works
/// with: blocks up to it come from the heap, of which up to twice as much is kept when free (mallopt(3), "dynamic mmap
/// threshold"). Setting the same directly would need unsafe code; other allocators do not mind.
pub(crate) fn keep_freed() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(LESSON)));
}
