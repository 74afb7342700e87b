//! Refusals as they are told: by the library, over the wire, by the command.

use std::ops::Range;

use pinfold_client::{Code, Error, PinRequest, Reason, Session};
use tonic::Status;

use crate::{Finished, Lab, reason_of};

/// What a bad request is answered with.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// The gRPC status.
    pub code: Code,
    /// For programs.
    pub reason: Reason,
    /// Of the command.
    pub exit: i32,
    /// What the message must hold.
    pub says: &'a [&'a str],
}

impl Answer<'_> {
    /// What the library says.
    pub fn check(&self, refused: Error) {
        let Error::Refused { reason, code, message, .. } = refused else { panic!("{refused:?}") };
        assert_eq!((code, reason), (self.code, Some(self.reason)), "{message}");
        self.check_words(&message);
    }

    /// What goes over the wire.
    pub fn check_status(&self, refused: &Status) {
        assert_eq!(
            (refused.code(), reason_of(refused).as_str()),
            (self.code, self.reason.as_str())
        );
        self.check_words(refused.message());
    }

    /// What any text says.
    pub fn check_words(&self, text: &str) {
        for word in self.says {
            assert!(text.contains(word), "{word:?} is not in {text:?}");
        }
    }

    /// How the command ends.
    pub async fn check_command(&self, lab: &Lab, arguments: &[&str]) {
        self.check_finished(&lab.pinfold(arguments).await, arguments);
    }

    /// How a command has ended.
    pub fn check_finished(&self, command: &Finished, arguments: &[&str]) {
        assert_eq!(command.code, self.exit, "{arguments:?}: {}", command.stderr);
        assert_eq!(command.stdout, "", "{arguments:?}");
        assert!(command.stderr.starts_with("pinfold: "), "{}", command.stderr);
        self.check_words(&command.stderr);
    }

    /// A pin by the library and by the command.
    pub async fn check_pin(
        &self,
        lab: &Lab,
        session: &Session,
        file: &str,
        range: Option<Range<u64>>,
    ) {
        let (export, path) = file.split_once('/').unwrap();
        let request = PinRequest::read_write(export, path);
        let (request, range) = match range {
            Some(range) => {
                let text = format!("{}..{}", range.start, range.end);
                (request.range(range), Some(text))
            }
            None => (request, None),
        };
        self.check(session.pin(request).await.unwrap_err());
        let mut arguments = vec!["pin", file];
        arguments.extend(range.iter().flat_map(|range| ["--range", range]));
        self.check_command(lab, &arguments).await;
    }
}
