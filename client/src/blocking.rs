//! The same without `async`: for programs of plain threads.
//!
//! A [`Session`] has a thread of its own in the background, which keeps it alive, and each call waits in
//! the thread that makes it. Sessions and pins can be shared by threads; not to be used inside an
//! asynchronous runtime, where a call would panic.
//!
//! ```no_run
//! use pinfold_client::{ConnectOptions, IfExists, PinRequest, blocking};
//!
//! # fn example() -> Result<(), pinfold_client::Error> {
//! let session = blocking::Session::connect(ConnectOptions::new("http://storage:7350"))?;
//! session.create("data", "log", 1 << 20, IfExists::Fail)?;
//! let pin = session.pin(PinRequest::read_write("data", "log"))?;
//! let (_buffer, _report) = pin.write(0, session.buffer(4096)?, 4096)?;
//! pin.commit()?;
//! pin.unpin()?;
//! session.close();
//! # Ok(())
//! # }
//! ```

use std::ops::Range;
use std::sync::Arc;

use tokio::runtime::{Builder, Runtime};

use crate::{
    Buffer, BufferPool, CommitReport, ConnectOptions, Created, DurableReport, Error, FileStat,
    Grant, IfExists, Part, PinRequest, ReadReport, TransferError, WriteReport,
};

/// A [session](crate::Session) whose calls wait.
#[derive(Debug)]
pub struct Session {
    session: crate::Session,
    background: Arc<Background>,
}

/// A [pin](crate::Pin) whose calls wait.
#[derive(Debug)]
pub struct Pin {
    pin: crate::Pin,
    background: Arc<Background>,
}

/// The thread in the background; ends with the last that needs it.
#[derive(Debug)]
struct Background(Option<Runtime>);

impl Session {
    /// As [`crate::Session::connect`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Session::connect`]; [`Error::NoThread`].
    pub fn connect(options: ConnectOptions) -> Result<Self, Error> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("pinfold")
            .enable_all()
            .build()
            .map_err(|source| Error::NoThread { source })?;
        let background = Arc::new(Background(Some(runtime)));
        let session = background.block_on(crate::Session::connect(options))?;
        Ok(Self { session, background })
    }

    /// Waits for a call that has no method here: `session.block_on(session.asynchronous().inspect())`.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.background.block_on(future)
    }

    /// The session as it is for asynchronous programs.
    pub fn asynchronous(&self) -> &crate::Session {
        &self.session
    }

    /// As [`crate::Session::create`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Session::create`].
    pub fn create(
        &self,
        export: &str,
        path: &str,
        size: u64,
        if_exists: IfExists,
    ) -> Result<Created, Error> {
        self.block_on(self.session.create(export, path, size, if_exists))
    }

    /// As [`crate::Session::stat`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Session::stat`].
    pub fn stat(&self, export: &str, path: &str) -> Result<FileStat, Error> {
        self.block_on(self.session.stat(export, path))
    }

    /// As [`crate::Session::pin`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Session::pin`].
    pub fn pin(&self, request: PinRequest) -> Result<Pin, Error> {
        let pin = self.block_on(self.session.pin(request))?;
        Ok(Pin { pin, background: self.background.clone() })
    }

    /// As [`crate::Session::buffer`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Session::buffer`].
    pub fn buffer(&self, capacity: usize) -> Result<Buffer, Error> {
        self.block_on(self.session.buffer(capacity))
    }

    /// As [`crate::Session::buffer_pool`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Session::buffer_pool`].
    pub fn buffer_pool(&self, count: usize, capacity: usize) -> Result<BufferPool, Error> {
        self.block_on(self.session.buffer_pool(count, capacity))
    }

    /// As [`crate::Session::close`].
    pub fn close(self) {
        self.background.block_on(self.session.close());
    }
}

impl Pin {
    /// The pin as it is for asynchronous programs.
    pub fn asynchronous(&self) -> &crate::Pin {
        &self.pin
    }

    /// What was granted.
    pub fn grant(&self) -> &Grant {
        self.pin.grant()
    }

    /// As [`crate::Pin::write`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Pin::write`].
    pub fn write(
        &self,
        offset: u64,
        buffer: Buffer,
        len: usize,
    ) -> Result<(Buffer, WriteReport), TransferError> {
        self.background.block_on(self.pin.write(offset, buffer, len))
    }

    /// As [`crate::Pin::write_vectored`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Pin::write_vectored`].
    pub fn write_vectored(
        &self,
        parts: &[Part],
        buffer: Buffer,
    ) -> Result<(Buffer, WriteReport), TransferError> {
        self.background.block_on(self.pin.write_vectored(parts, buffer))
    }

    /// As [`crate::Pin::read`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Pin::read`].
    pub fn read(
        &self,
        offset: u64,
        len: usize,
        buffer: Buffer,
    ) -> Result<(Buffer, ReadReport), TransferError> {
        self.background.block_on(self.pin.read(offset, len, buffer))
    }

    /// As [`crate::Pin::read_vectored`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Pin::read_vectored`].
    pub fn read_vectored(
        &self,
        parts: &[Part],
        buffer: Buffer,
    ) -> Result<(Buffer, ReadReport), TransferError> {
        self.background.block_on(self.pin.read_vectored(parts, buffer))
    }

    /// As [`crate::Pin::write_visible`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Pin::write_visible`].
    pub fn write_visible(
        &self,
        offset: u64,
        buffer: Buffer,
        len: usize,
    ) -> Result<(Buffer, WriteReport), TransferError> {
        self.background.block_on(self.pin.write_visible(offset, buffer, len))
    }

    /// As [`crate::Pin::write_durable`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Pin::write_durable`].
    pub fn write_durable(
        &self,
        offset: u64,
        buffer: Buffer,
        len: usize,
    ) -> Result<(Buffer, DurableReport), TransferError> {
        self.background.block_on(self.pin.write_durable(offset, buffer, len))
    }

    /// As [`crate::Pin::commit`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Pin::commit`].
    pub fn commit(&self) -> Result<CommitReport, Error> {
        self.background.block_on(self.pin.commit())
    }

    /// As [`crate::Pin::commit_range`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Pin::commit_range`].
    pub fn commit_range(&self, range: Range<u64>) -> Result<CommitReport, Error> {
        self.background.block_on(self.pin.commit_range(range))
    }

    /// As [`crate::Pin::unpin`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Pin::unpin`].
    pub fn unpin(self) -> Result<(), Error> {
        self.background.block_on(self.pin.unpin())
    }
}

impl Background {
    fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.0.as_ref().expect("it is taken only by the drop").block_on(future)
    }
}

impl Drop for Background {
    /// What is still in flight, or waits for the kernel, holds nobody up.
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
