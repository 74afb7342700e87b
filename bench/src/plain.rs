//! The client of `plain-stream`.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pinfold_proto::v1::{ReadRequest, ReadResponse, WriteRequest, WriteResponse};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

use crate::peer::Peer;
use crate::place::{beside_us, text};

/// As long as Pinfold's pieces.
pub(crate) const FRAME_BYTES: usize = 1 << 20;

/// A plain gRPC service in another process, and a connection to it.
pub(crate) struct Plain {
    grpc: tonic::client::Grpc<Channel>,
    _server: Peer,
}

impl Plain {
    pub(crate) async fn start(file: &Path) -> Result<Self> {
        let mut server = Peer::start(&beside_us("plain-stream")?, &[text(file)?])?;
        let channel = Endpoint::from_shared(server.hear("listening")?)?.connect().await?;
        let grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(2 * FRAME_BYTES);
        Ok(Self { grpc, _server: server })
    }

    /// Sends the bytes in one stream, each frame a copy as in the client library.
    pub(crate) async fn write(&mut self, bytes: Arc<[u8]>) -> Result<()> {
        self.grpc.ready().await?;
        let frames = (0..bytes.len()).step_by(FRAME_BYTES).map(move |start| {
            let end = bytes.len().min(start + FRAME_BYTES);
            let data = bytes[start..end].to_vec().into();
            WriteRequest { offset: start as u64, data, ..WriteRequest::default() }
        });
        let request = tonic::Request::new(tokio_stream::iter(frames));
        let path = PathAndQuery::from_static("/bench.Plain/Write");
        let codec = ProstCodec::<WriteRequest, WriteResponse>::default();
        self.grpc.client_streaming(request, path, codec).await?;
        Ok(())
    }

    /// Fetches as many bytes in one stream.
    pub(crate) async fn read(&mut self, into: &mut [u8]) -> Result<()> {
        self.grpc.ready().await?;
        let request = ReadRequest {
            length: u32::try_from(into.len())?,
            pin_id: FRAME_BYTES as u64,
            ..ReadRequest::default()
        };
        let path = PathAndQuery::from_static("/bench.Plain/Read");
        let codec = ProstCodec::<ReadRequest, ReadResponse>::default();
        let answer = self.grpc.server_streaming(tonic::Request::new(request), path, codec).await?;
        let (mut frames, mut filled) = (answer.into_inner(), 0);
        while let Some(frame) = frames.message().await? {
            into[filled..filled + frame.data.len()].copy_from_slice(&frame.data);
            filled += frame.data.len();
        }
        ensure!(filled == into.len(), "the stream ended after {filled} bytes");
        Ok(())
    }

    /// How long so many calls take that do nothing.
    pub(crate) async fn empty_calls(&mut self, count: u32) -> Result<Duration> {
        let started = Instant::now();
        for _ in 0..count {
            self.grpc.ready().await?;
            let path = PathAndQuery::from_static("/bench.Plain/Empty");
            let codec = ProstCodec::<(), ()>::default();
            self.grpc.unary(tonic::Request::new(()), path, codec).await?;
        }
        Ok(started.elapsed())
    }
}
