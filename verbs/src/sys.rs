//! The one door to libibverbs: the foreign names, and the few helpers that every object needs.
//!
//! Nothing here knows about Pinfold's own types. Each verb is called at its place of use, in an
//! unsafe block of its own.

use std::io;
use std::os::raw::c_int;
use std::ptr::NonNull;

pub(crate) use rdma_sys as ffi;

/// Turns the result of a verb that reports failure as an errno value (most), or as -1 with `errno`
/// set (the older ones), into a [`io::Result`].
pub(crate) fn check(ret: c_int) -> io::Result<()> {
    match ret {
        0 => Ok(()),
        errno if errno > 0 => Err(io::Error::from_raw_os_error(errno)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// To be called right before a verb that can fail in a way that means anything: fails in its place if
/// it is its turn (`pinfold_leases::fault`). Nothing without the feature `mutants`.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub(crate) fn pass(_verb: &'static str) -> io::Result<()> {
    Ok(())
}

#[cfg(feature = "mutants")]
pub(crate) fn pass(verb: &'static str) -> io::Result<()> {
    pinfold_leases::fault::VERBS.pass(verb)
}

/// Destroys an object. What a device refuses is asked of it once more: to give an object up for lost is
/// to keep it until the process ends.
pub(crate) fn destroy(verb: &'static str, call: impl Fn() -> c_int) -> io::Result<()> {
    let attempt = || pass(verb).and_then(|()| check(call()));
    attempt().or_else(|_| attempt())
}

/// Turns the result of a verb that returns an object, or null with `errno` set.
pub(crate) fn check_pointer<T>(pointer: *mut T) -> io::Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(io::Error::last_os_error)
}

/// A C structure of which all bytes zero is a valid and meaningful value.
///
/// # Safety
///
/// The type holds only integers, nullable pointers, arrays, unions and `Option`s of functions.
pub(crate) unsafe trait Plain: Sized {}

/// A C structure with all bytes zero, as verbs expect attributes to be before they are filled in.
pub(crate) fn zeroed<T: Plain>() -> T {
    // SAFETY: `Plain` is implemented only for types of which all bytes zero is a valid value.
    unsafe { std::mem::zeroed() }
}

macro_rules! plain {
    ($($name:ident),+ $(,)?) => {$(
        // SAFETY: generated from (or written after) the C declaration; integers, arrays and
        // nullable pointers only, the enumerations being plain integers too.
        unsafe impl Plain for ffi::$name {}
    )+};
}

plain!(
    ibv_device_attr_ex,
    ibv_gid_entry,
    ibv_port_attr,
    ibv_qp_attr,
    ibv_qp_init_attr,
    ibv_qp_init_attr_ex,
    ibv_send_wr,
    ibv_sge,
    ibv_wc,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_success_and_positive_is_the_errno() {
        assert!(check(0).is_ok());
        let error = check(libc::EINVAL).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn null_is_an_error() {
        assert!(check_pointer::<u8>(std::ptr::null_mut()).is_err());
        let mut byte = 0_u8;
        assert!(check_pointer(&raw mut byte).is_ok());
    }
}
