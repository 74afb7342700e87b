//! Guarded files and their pins as an operator sees them, page by page.

use std::num::NonZeroUsize;

use super::{FileView, Registry};
use crate::ids::PinId;

/// Which part of the files to show.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct InspectPage {
    /// `None`: from the first on.
    pub(crate) from: Option<PagePlace>,
    /// Files and pins at most, taken together.
    pub(crate) size: NonZeroUsize,
}

/// Where a page begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct PagePlace {
    /// The counter of a file's generation: that file, or the next one.
    pub(crate) counter: u64,
    /// Of that very file the pins from here on.
    pub(crate) pin: PinId,
}

impl PagePlace {
    /// Where a page begins with this.
    pub(crate) fn of(view: &FileView) -> Self {
        let pin = view.pins.first().map_or(PinId(0), |(pin, ..)| *pin);
        Self { counter: view.generation.counter, pin }
    }
}

impl Registry {
    /// Files in the order of their generations, and where the next page begins. A file whose pins don't fit
    /// goes on there. What changes between two pages may be missing, or be seen twice; a file or pin that
    /// stays is seen once.
    pub(crate) fn files_view(&self, page: InspectPage) -> (Vec<FileView>, Option<PagePlace>) {
        let from = page.from.unwrap_or(PagePlace { counter: 0, pin: PinId(0) });
        let later = self.files.iter().filter(|(_, file)| file.generation.counter >= from.counter);
        let mut later: Vec<_> =
            later.map(|(guard, file)| (file.generation.counter, *guard)).collect();
        later.sort_unstable();
        let (mut views, mut left) = (Vec::new(), page.size.get());
        for (counter, guard) in later {
            let first = if counter == from.counter { from.pin } else { PinId(0) };
            if left == 0 {
                return (views, Some(PagePlace { counter, pin: first }));
            }
            // At least one pin with its file, so that each page goes on.
            let pins_at_most = (left - 1).max(1);
            let (view, next) = self.file_view(guard, &self.files[&guard], first, pins_at_most);
            left = left.saturating_sub(view.pins.len() + 1);
            views.push(view);
            if let Some(pin) = next {
                return (views, Some(PagePlace { counter, pin }));
            }
        }
        (views, None)
    }
}
