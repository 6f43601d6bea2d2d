//! The process's heap, after much of it was used for a moment: lists are decoded in far more memory than what is kept of them.

/// Gives unused memory back to the system. Takes some milliseconds.
pub(crate) fn trim() {
    // glibc keeps what was freed, on the heap of each thread that asked for it. Other C libraries give it back by themselves.
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointers; may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
