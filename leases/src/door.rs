//! The door that every system call of this crate goes through on its way to the kernel: where tests
//! make the n-th one fail. Nothing in a build without tests and without the feature `mutants`.
//!
//! Not at the door, because they cannot fail in a way that means anything: close(2), which frees the
//! descriptor whatever it says; letting a lease go, which fails only when there is none any more
//! (`generic_delete_lease`, fs/locks.c); waiting for signals and for the turn of a lock; and what is
//! only looked up in /proc, where "unknown" is an answer.

/// To be called right before a system call, which is named as in messages: fails in its place if it is
/// its turn.
#[cfg(not(any(test, feature = "mutants")))]
#[inline(always)]
pub(crate) fn pass<E>(_call: &'static str) -> Result<(), E> {
    Ok(())
}

#[cfg(any(test, feature = "mutants"))]
pub(crate) fn pass<E: crate::fault::OfErrno>(call: &'static str) -> Result<(), E> {
    crate::fault::LEASES.pass(call)
}
