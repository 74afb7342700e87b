//! What both demos tell alike: a pin is taken back, from the notice to the timeline.

use anyhow::{Context, Result, bail, ensure};
use pinfold_cli::timeline;
use pinfold_client::{DrainNotice, Event, Events};
use tokio::task::JoinHandle;

use crate::Screen;

/// Follows a revocation until the local process that wanted the file is through, and draws it.
/// `told` says what the client hears, `through` why the local process went on.
pub async fn taken_back(
    screen: &Screen,
    events: &mut Events,
    local: JoinHandle<()>,
    told: impl Fn(&DrainNotice) -> String,
    through: &str,
) -> Result<()> {
    let revocation = loop {
        match events.next().await.context("the session ended")? {
            Event::Draining { notice, .. } => screen.step("remote", &told(&notice)),
            Event::Revoked { revocation, .. } => break revocation,
            other => bail!("unexpected: {other:?}"),
        }
    };
    local.await?;
    let timings = revocation.timings.context("the server sent no timings")?;
    ensure!(timings.break_pending_at_release, "the kernel's timer let the local process through");
    screen.step("local", through);
    println!();
    print!("{}", timeline::draw(&timeline::revocation(&timings), screen.look));
    println!();
    Ok(())
}
