//! What regions cost on this device and kernel: the time to register, fence and deregister them, which
//! grows with their pages whether these are populated or not, and the kernel's memory.

use std::fmt;
use std::time::{Duration, Instant};

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::mm::{MprotectFlags, mprotect};

use super::SelfTestError;
use super::rig::Rig;
use crate::device::Device;
use crate::error::Error;
use crate::region::{Access, RegistrationMode};

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
/// Registered on demand and hardly populated: it costs address space.
const SPARSE_BYTES: u64 = GIB;
/// Registered on demand with every page present, which costs so much memory for a moment.
const POPULATED_BYTES: u64 = 32 << 20;
/// Pinned: half of the usual limit of locked memory.
const PINNED_BYTES: u64 = 4 << 20;
/// The quickest counts: the others were interrupted.
const ROUNDS: usize = 3;

/// rxe's number in place of a vendor's.
const VENDOR_OF_RXE: u32 = 0xff_ffff;
/// On demand, rxe has the page frame number of each page.
const PAGE_ON_DEMAND_RXE: u64 = 8;
/// mlx5 has a DMA address and an entry of the NIC's translation table beside it. Others are taken to be
/// like that.
const PAGE_ON_DEMAND: u64 = 24;
/// A scatter list and the device's translation table, where no two pages lie side by side.
const PAGE_PINNED: u64 = 48;

/// What the regions of one device cost.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RegionCost {
    /// To register one.
    pub register: Price,
    /// To take its memory away (`mprotect(PROT_NONE)`), which waits for the device: what the region adds
    /// to that of the page tables. Nothing where pages are pinned.
    pub fence: Price,
    /// To deregister one.
    pub deregister: Price,
    /// Kernel memory that a region of 1 GiB holds, in bytes. Known, not measured: at least so much.
    pub memory_bytes_per_gib: u64,
}

/// A part for each region, and a part that grows with its size.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Price {
    /// Of a region of one page.
    pub each: Duration,
    /// Of each GiB.
    pub per_gib: Duration,
}

impl Price {
    /// Of a region of so many bytes.
    #[must_use]
    pub fn of(&self, bytes: u64) -> Duration {
        self.each + scaled(self.per_gib, bytes, GIB)
    }
}

impl RegionCost {
    /// Above what was seen anywhere, emulated processors included: where it can't be measured.
    #[must_use]
    pub fn assumed(device: &Device, mode: RegistrationMode) -> Self {
        let price = Price { each: Duration::from_millis(1), per_gib: Duration::from_millis(20) };
        let fence = match mode {
            RegistrationMode::OnDemand => price,
            RegistrationMode::Pinned => Price::default(),
        };
        let memory_bytes_per_gib = memory_bytes_per_gib(device, mode);
        Self { register: price, fence, deregister: price, memory_bytes_per_gib }
    }

    /// Kernel memory of a region of so many bytes, in bytes.
    #[must_use]
    pub fn memory_of(&self, bytes: u64) -> u64 {
        let product = u128::from(bytes) * u128::from(self.memory_bytes_per_gib);
        u64::try_from(product.div_ceil(GIB.into())).unwrap_or(u64::MAX)
    }
}

impl fmt::Display for RegionCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |price: &Price| price.of(GIB).as_secs_f64() * 1000.0;
        write!(
            f,
            "1 GiB takes {:.1} ms to register, {:.1} ms to fence, {:.1} ms to deregister, and {} KiB \
             of kernel memory",
            ms(&self.register),
            ms(&self.fence),
            ms(&self.deregister),
            self.memory_bytes_per_gib >> 10
        )
    }
}

/// Measures what regions cost, of at most `max_region_bytes` each, with memory of its own. Blocks: for
/// some ten milliseconds, on an emulated processor for some hundred.
///
/// # Errors
///
/// [`SelfTestError::Verbs`]: memory could not be had or registered.
pub fn region_cost(
    device: &Device,
    mode: RegistrationMode,
    max_region_bytes: u64,
) -> Result<RegionCost, SelfTestError> {
    let rig = Rig::new(device, mode)?;
    let one = Sample::quickest(&rig, PAGE, Filling::Full)?;
    let price = |larger: &Sample, step: fn(&Sample) -> Duration| {
        let per_gib = scaled(step(larger).saturating_sub(step(&one)), GIB, larger.bytes);
        Price { each: step(&one), per_gib }
    };
    let (large, mut fence) = match mode {
        RegistrationMode::OnDemand => {
            let sparse = SPARSE_BYTES.min(max_region_bytes);
            let sparse = Sample::quickest(&rig, sparse, Filling::FirstPage)?;
            // What is left to do once a region is fenced does not depend on what it was populated with.
            let populated = Sample::quickest(&rig, POPULATED_BYTES, Filling::Full)?;
            (sparse, price(&populated, |sample| sample.fence))
        }
        RegistrationMode::Pinned => {
            (Sample::quickest(&rig, PINNED_BYTES, Filling::Full)?, Price::default())
        }
    };
    fence.per_gib = fence.per_gib.max(price(&large, |sample| sample.fence).per_gib);
    Ok(RegionCost {
        register: price(&large, |sample| sample.register),
        fence,
        deregister: price(&large, |sample| sample.deregister),
        memory_bytes_per_gib: memory_bytes_per_gib(device, mode),
    })
}

fn memory_bytes_per_gib(device: &Device, mode: RegistrationMode) -> u64 {
    let of_page = match mode {
        RegistrationMode::Pinned => PAGE_PINNED,
        RegistrationMode::OnDemand if device.capabilities().vendor_id == VENDOR_OF_RXE => {
            PAGE_ON_DEMAND_RXE
        }
        RegistrationMode::OnDemand => PAGE_ON_DEMAND,
    };
    GIB / PAGE * of_page
}

/// How many of a sample's pages are present when it is registered. With none at all the kernel would tell
/// no device of the fence.
#[derive(Clone, Copy)]
enum Filling {
    FirstPage,
    Full,
}

/// How long each step took with one region.
#[derive(Clone, Copy, Debug)]
struct Sample {
    bytes: u64,
    register: Duration,
    fence: Duration,
    deregister: Duration,
}

impl Sample {
    fn quickest(rig: &Rig, bytes: u64, filling: Filling) -> Result<Self, SelfTestError> {
        let mut quickest = Self::take(rig, bytes, filling)?;
        for _ in 1..ROUNDS {
            quickest = quickest.or(&Self::take(rig, bytes, filling)?);
        }
        Ok(quickest)
    }

    fn or(&self, other: &Self) -> Self {
        Self {
            bytes: self.bytes,
            register: self.register.min(other.register),
            fence: self.fence.min(other.fence),
            deregister: self.deregister.min(other.deregister),
        }
    }

    fn take(rig: &Rig, bytes: u64, filling: Filling) -> Result<Self, SelfTestError> {
        let len = usize::try_from(bytes).unwrap_or(usize::MAX);
        let no_memory = |source| rig.failed(Error::MapBuffer { len, source });
        let map = MmapOptions::new().len(len).no_reserve_swap().map_anon().map_err(no_memory)?;
        let map = MmapRaw::from(map);
        // On-demand translations are of the smallest pages, as they are of a fragmented file.
        map.advise(Advice::NoHugePage).or_else(unless_unknown).map_err(no_memory)?;
        let present = match filling {
            Filling::FirstPage => PAGE as usize,
            Filling::Full => len,
        };
        map.advise_range(Advice::PopulateWrite, 0, present).map_err(no_memory)?;
        // What the page tables alone take is the mapping's and not the region's, however many there are.
        let alone = timed(|| allow(&map, false)).map_err(no_memory)?;
        allow(&map, true).map_err(no_memory)?;
        map.advise_range(Advice::PopulateWrite, 0, present).map_err(no_memory)?;

        let began = Instant::now();
        let access = Access::REMOTE_READ_WRITE;
        let region = match rig.mode {
            RegistrationMode::OnDemand => rig.domain.register_on_demand(map, 0..len, access),
            RegistrationMode::Pinned => rig.domain.register_pinned(map, 0..len, access),
        };
        let region = region.map_err(|refused| rig.failed(refused.into()))?;
        let register = began.elapsed();
        let fence = match rig.mode {
            RegistrationMode::OnDemand => {
                let with_it = timed(|| allow(region.memory(), false)).map_err(no_memory)?;
                with_it.saturating_sub(alone)
            }
            RegistrationMode::Pinned => Duration::ZERO,
        };
        let began = Instant::now();
        region.deregister().map_err(|failed| rig.failed(failed.into()))?;
        Ok(Self { bytes, register, fence, deregister: began.elapsed() })
    }
}

fn timed(work: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<Duration> {
    let began = Instant::now();
    work().map(|()| began.elapsed())
}

fn allow(map: &MmapRaw, access: bool) -> std::io::Result<()> {
    let both = MprotectFlags::READ | MprotectFlags::WRITE;
    let flags = if access { both } else { MprotectFlags::empty() };
    // SAFETY: the range is exactly this mapping, to which there are no references.
    Ok(unsafe { mprotect(map.as_mut_ptr().cast(), map.len(), flags) }?)
}

/// A kernel without huge pages does not know the advice.
fn unless_unknown(error: std::io::Error) -> std::io::Result<()> {
    if error.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(error) }
}

/// `time` × `numerator` / `denominator`.
fn scaled(time: Duration, numerator: u64, denominator: u64) -> Duration {
    let nanos = time.as_nanos() * u128::from(numerator) / u128::from(denominator.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_price_has_a_part_for_each_region_and_one_for_its_size() {
        let price = Price { each: Duration::from_micros(50), per_gib: Duration::from_millis(8) };
        assert_eq!(price.of(0), Duration::from_micros(50));
        assert_eq!(price.of(GIB / 2), Duration::from_micros(4_050));
        assert_eq!(price.of(1 << 50).as_secs(), 8_388, "a PiB does not overflow");
    }

    #[test]
    fn memory_is_rounded_up() {
        let price = Price::default();
        let memory_bytes_per_gib = 2 << 20;
        let cost =
            RegionCost { register: price, fence: price, deregister: price, memory_bytes_per_gib };
        assert_eq!((cost.memory_of(0), cost.memory_of(1), cost.memory_of(PAGE)), (0, 1, 8));
        assert_eq!(cost.memory_of(1 << 40), 2 << 30);
    }
}
