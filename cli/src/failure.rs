//! What went wrong, as a person reads it: what happened, why, and what to do about it.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::{fmt, io};

use pinfold_client::RevocationReason::WriteBackFailed;
use pinfold_client::{Error, Reason};

use crate::exit::Exit;

const NOT_WRITTEN_BACK: &str = "free space on the server's file system or replace its device first \
                                (pinfoldd's log says which), then write it again; put --resume \
                                compares with what the medium has";

/// The end of a command that did not do what it should.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    /// What was being done, if the source does not say enough.
    context: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
    hint: Option<&'static str>,
}

impl Failure {
    /// A failure that is no error of the library.
    pub(crate) fn new(exit: Exit, what: impl Into<String>) -> Self {
        Self { exit, context: Some(what.into()), source: None, hint: None }
    }

    /// A local file or the output.
    pub(crate) fn local(what: impl Into<String>, source: io::Error) -> Self {
        Self {
            exit: Exit::LocalIo,
            context: Some(what.into()),
            source: Some(source.into()),
            hint: None,
        }
    }

    /// The same failure, as part of something larger.
    pub(crate) fn within(self, what: impl Into<String>) -> Self {
        Self {
            exit: self.exit,
            hint: self.hint,
            context: Some(what.into()),
            source: Some(Box::new(self)),
        }
    }

    /// The error of the library that it is made of, if it is.
    pub(crate) fn library_error(&self) -> Option<&Error> {
        self.source.as_ref()?.downcast_ref()
    }

    /// The same failure with this hint, if it has none.
    pub(crate) fn or_hint(mut self, hint: &'static str) -> Self {
        self.hint.get_or_insert(hint);
        self
    }

    /// The same failure with this hint, whatever it had.
    pub(crate) fn with_hint(mut self, hint: &'static str) -> Self {
        self.hint = Some(hint);
        self
    }

    /// Why the server refused, if it is that.
    pub(crate) fn reason(&self) -> Option<Reason> {
        self.library_error()?.reason()
    }

    /// The lines for the terminal. Each source is told once: some libraries repeat theirs.
    pub(crate) fn report(&self) -> String {
        let mut last = self.to_string();
        let mut report = format!("pinfold: {last}\n");
        let mut source = self.source();
        while let Some(error) = source {
            let text = error.to_string();
            if !last.contains(&text) {
                let _ = writeln!(report, "  because: {text}");
            }
            last = text;
            source = error.source();
        }
        if let Some(hint) = self.hint {
            let _ = writeln!(report, "hint: {hint}");
        }
        report
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.context, &self.source) {
            (Some(context), _) => f.write_str(context),
            (None, Some(source)) => source.fmt(f),
            (None, None) => f.write_str("failed"),
        }
    }
}

impl StdError for Failure {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        let source = self.source.as_deref()?;
        match self.context {
            Some(_) => Some(source),
            // Its text is this one's own.
            None => source.source(),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            exit: Exit::of_error(&error),
            context: None,
            hint: hint(&error),
            source: Some(Box::new(error)),
        }
    }
}

/// What to do about it, where the message does not say.
fn hint(error: &Error) -> Option<&'static str> {
    match error {
        Error::Unreachable { .. } | Error::NoWelcome { .. } => {
            Some("name the server with --server http://HOST:PORT or in PINFOLD_SERVER")
        }
        Error::NoRdmaDevice { .. } => Some(
            "a soft device will do: `modprobe rdma_rxe && rdma link add rxe0 type rxe netdev \
             INTERFACE`; or go without: `--transport stream`",
        ),
        Error::LaneLost { .. } => {
            Some("check that both hosts reach each other by RDMA, then retry")
        }
        Error::Refused { reason: Some(reason), .. } => refusal_hint(*reason),
        Error::Draining { notice, .. } if notice.reason == WriteBackFailed => {
            Some(NOT_WRITTEN_BACK)
        }
        Error::Revoked { revocation, .. } if revocation.reason == WriteBackFailed => {
            Some(NOT_WRITTEN_BACK)
        }
        Error::GaveUp { source, .. } => hint(source),
        _ => None,
    }
}

fn refusal_hint(reason: Reason) -> Option<&'static str> {
    match reason {
        Reason::ExportNotFound => Some("write EXPORT/PATH; `pinfold ls` shows the exports"),
        Reason::FileNotFound => {
            Some("`pinfold ls` shows what there is; `pinfold put` makes a file")
        }
        Reason::FileBusy => Some("close the file in those processes, then retry"),
        Reason::FileDraining => Some("retry when the pins on it are gone"),
        Reason::FilePinned | Reason::RangeHeld => {
            Some("retry when the pins on it are gone; `pinfold ps` shows who has them")
        }
        Reason::FileChanged | Reason::FileModified | Reason::StaleGeneration => {
            Some("pin it again and start over")
        }
        Reason::ExportQuiesced => {
            Some("retry when the export is resumed; `pinfold ls -l` shows it")
        }
        Reason::ExportStalled => {
            Some("thaw the file system on the server, or look after its device, then retry")
        }
        Reason::WriteBackFailed => Some(NOT_WRITTEN_BACK),
        Reason::NoSpace => Some("free some space on the server's file system"),
        Reason::DeviceCannotRegister => Some("`pinfoldd doctor` on the server says what it can"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use pinfold_client::Code;

    use super::*;

    #[test]
    fn a_report_tells_what_why_and_what_to_do() {
        let error = Error::Refused {
            doing: "pin data/log".to_owned(),
            reason: Some(Reason::FileBusy),
            code: Code::FailedPrecondition,
            message: "open in 4711 (cat)".to_owned(),
        };
        assert_eq!(
            Failure::from(error).within("putting app.log into data/log").report(),
            "pinfold: putting app.log into data/log\n  \
             because: the server refused to pin data/log: open in 4711 (cat)\n\
             hint: close the file in those processes, then retry\n",
        );
    }

    #[test]
    fn a_local_error_keeps_the_systems_words() {
        let source = io::Error::from(io::ErrorKind::NotFound);
        assert_eq!(
            Failure::local("cannot open app.log", source).report(),
            "pinfold: cannot open app.log\n  because: entity not found\n",
        );
    }
}
