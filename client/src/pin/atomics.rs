//! Eight bytes changed as one step, by the server's NIC.

use pinfold_verbs::{ATOMIC_BYTES, Atomic, Error as VerbsError};

use super::{Batch, Pin, again};
use crate::Error;
use crate::fabric::{Of, Operation};
use crate::lane::{Asked, Direction};
use crate::plan::Part;
use crate::transfer::Transfer;

impl Pin {
    /// Adds to the eight bytes at `offset`, and returns what was there; it wraps around. They are a number
    /// in the byte order of the server's host.
    ///
    /// It is one step among the atomics of all who come by the same device of the server
    /// (IBTA 9.4.5), not beside what processors there write. As a write it survives power loss after a
    /// [`commit`](Self::commit). If the answer is lost, nobody knows whether it was done: it is not tried
    /// again.
    ///
    /// # Errors
    ///
    /// [`Error::NoAtomics`] where the grant [offers none](crate::Grant::no_atomics_because), or this
    /// host's device has none; [`Error::NotAtomic`]; else those of [`write`](Self::write).
    pub async fn fetch_add(&self, offset: u64, number: u64) -> Result<u64, Error> {
        self.change(offset, Atomic::FetchAdd(number)).await
    }

    /// Replaces the eight bytes at `offset` if they are what was `expected`, and returns what was there:
    /// it was done if that is the same. Else as [`fetch_add`](Self::fetch_add).
    ///
    /// # Errors
    ///
    /// As [`fetch_add`](Self::fetch_add).
    pub async fn compare_swap(&self, offset: u64, expected: u64, new: u64) -> Result<u64, Error> {
        self.change(offset, Atomic::CompareSwap { expected, new }).await
    }

    /// Replaces the eight bytes at `offset` as one step: whoever reads them sees all of the number or nothing
    /// of it, in the byte order of the server's host (ATOMIC WRITE, IBTA annex A19). The server's NIC begins it
    /// when the flushes that went out before it on this pin have ended: so a
    /// [durable write](Self::write_durable) can be published by a number that points to it. As a write it
    /// survives power loss after a [`flush`](Self::flush) or a [`commit`](Self::commit).
    ///
    /// # Errors
    ///
    /// [`Error::NoAtomicWrite`] where the grant [offers none](crate::Grant::no_atomic_write_because), or this
    /// host can't ask for it; else as [`fetch_add`](Self::fetch_add).
    pub async fn write_atomic(&self, offset: u64, number: u64) -> Result<(), Error> {
        self.change(offset, Atomic::Write(number)).await.map(drop)
    }

    async fn change(&self, offset: u64, atomic: Atomic) -> Result<u64, Error> {
        self.check_writable()?;
        self.check()?;
        let lacks = |because: &str| self.lacks(atomic, because.to_owned());
        let not_offered = match atomic {
            Atomic::Write(_) => &self.grant.no_atomic_write_because,
            Atomic::FetchAdd(_) | Atomic::CompareSwap { .. } => &self.grant.no_atomics_because,
        };
        if let Some(because) = not_offered {
            return Err(lacks(because));
        }
        let Some(fabric) = &self.fabric else {
            return Err(lacks("the session is not connected by RDMA"));
        };
        let piece = self.reach().atomic(offset);
        let piece =
            piece.map_err(|refusal| Error::from_refusal(refusal, &self.file, self.reach()))?;
        let part = Part { offset, bytes: 0..ATOMIC_BYTES };
        let entry = self.enter(std::slice::from_ref(&part));
        self.cell.settled(&part.stretch()).await;
        let mut transfer = Transfer::new(&self.cell, Direction::Write, part.stretch());
        let batch = Batch { pin: self, returned: false };
        let operation = Operation {
            asked: Asked::Atomic(atomic),
            pieces: &[piece],
            buffer: fabric.small_buffer().await?,
            of: Of::Transfer(&transfer),
        };
        let doing = || format!("change 8 bytes at byte {offset} of {}", self.file);
        let ran = self.run(fabric, operation, doing).await;
        batch.returned();
        transfer.end();
        let buffer = ran.map_err(|(error, _)| match error {
            Error::Verbs { source: VerbsError::NoAtomics { device }, .. } => {
                lacks(&format!("RDMA device {device} of this host has none"))
            }
            Error::Verbs { source: VerbsError::NoAtomicWrite { device, why }, .. } => {
                lacks(&format!("RDMA device {device} of this host can't be used for it: {why}"))
            }
            // The pin is valid, so it is not the key; whether the far end has done it is not known.
            Error::RemoteRefused { doing, status } if again::is_refusal(status) => {
                Error::LaneLost { doing, status }
            }
            error => error,
        })?;
        let mut there = [0; ATOMIC_BYTES];
        there.copy_from_slice(&buffer.as_slice()[..ATOMIC_BYTES]);
        fabric.return_small_buffer(buffer);
        if let Some(entry) = entry {
            entry.succeed();
        }
        Ok(u64::from_ne_bytes(there))
    }

    fn lacks(&self, atomic: Atomic, because: String) -> Error {
        let file = self.file.to_string();
        match atomic {
            Atomic::Write(_) => Error::NoAtomicWrite { file, because },
            Atomic::FetchAdd(_) | Atomic::CompareSwap { .. } => Error::NoAtomics { file, because },
        }
    }
}
