//! A client that writes to a file until it can't, and says how that was: `writer URL DEVICE EXPORT/PATH`,
//! DEVICE being `none` for the stream path. A process of its own, which can be stopped and killed.
#![forbid(unsafe_code)]

use pinfold_client::{ConnectOptions, Error, Pin, PinRequest, RdmaDevice, Session, Transport};

const PAGE: usize = 4096;
/// Writes before it says that it writes.
const SOME: u64 = 20;

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, device, file] = &arguments[..] else { panic!("writer URL DEVICE EXPORT/PATH") };
    let (device, transport) = match device.as_str() {
        "none" => (RdmaDevice::None, Transport::Stream),
        name => (RdmaDevice::Named(name.to_owned()), Transport::Rdma),
    };
    let session = Session::connect(ConnectOptions::new(url).rdma_device(device)).await.unwrap();
    let (export, path) = file.split_once('/').expect("EXPORT/PATH");
    let request = PinRequest::read_write(export, path).transport(transport);
    let pin = session.pin(request).await.unwrap();
    let pages = pin.grant().valid_end / PAGE as u64;
    let mut count = 0;
    let ended = loop {
        if let Err(error) = write(&session, &pin, count % pages).await {
            break error;
        }
        count += 1;
        if count == SOME {
            println!("writing");
        }
    };
    println!("ended {ended:?}");
    println!("again {:?}", write(&session, &pin, 0).await);
}

async fn write(session: &Session, pin: &Pin, page: u64) -> Result<(), Error> {
    let mut buffer = session.buffer(PAGE).await?;
    buffer.as_mut_slice().fill(b'R');
    let written = pin.write(page * PAGE as u64, buffer, PAGE).await;
    written.map(drop).map_err(|failed| failed.error)
}
