//! What the stream path stands beside: a gRPC service that takes and gives the bytes of a file in one
//! stream, and does nothing else. No session, no pin, no guard. `plain-stream FILE` says where it listens.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::task::{Context, Poll};

use anyhow::Result;
use pinfold_proto::v1::{ReadRequest, ReadResponse, WriteRequest, WriteResponse};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

/// One frame, and what a message has around it.
const MESSAGE_BYTES_MAX: usize = (1 << 20) + (16 << 10);

/// Frames that are read ahead of the connection.
const READ_AHEAD: usize = 4;

#[derive(Clone)]
struct Plain(Arc<File>);

struct Write(Arc<File>);
struct Read(Arc<File>);
struct Empty;

impl tonic::server::NamedService for Plain {
    const NAME: &'static str = "bench.Plain";
}

impl Service<http::Request<tonic::body::Body>> for Plain {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let file = self.0.clone();
        Box::pin(async move {
            Ok(match request.uri().path() {
                "/bench.Plain/Write" => {
                    let mut grpc = tonic::server::Grpc::new(ProstCodec::default())
                        .max_decoding_message_size(MESSAGE_BYTES_MAX);
                    grpc.client_streaming(Write(file), request).await
                }
                "/bench.Plain/Read" => {
                    let mut grpc = tonic::server::Grpc::new(ProstCodec::default());
                    grpc.server_streaming(Read(file), request).await
                }
                "/bench.Plain/Empty" => {
                    tonic::server::Grpc::new(ProstCodec::default()).unary(Empty, request).await
                }
                other => Status::unimplemented(other.to_owned()).into_http(),
            })
        })
    }
}

impl tonic::server::ClientStreamingService<WriteRequest> for Write {
    type Response = WriteResponse;
    type Future = BoxFuture<Response<Self::Response>, Status>;

    fn call(&mut self, request: Request<Streaming<WriteRequest>>) -> Self::Future {
        let file = self.0.clone();
        Box::pin(async move {
            let mut frames = request.into_inner();
            while let Some(frame) = frames.message().await? {
                file.write_all_at(&frame.data, frame.offset)?;
            }
            Ok(Response::new(WriteResponse {}))
        })
    }
}

/// `length` is that of all frames; each is `pin_id` bytes long.
impl tonic::server::ServerStreamingService<ReadRequest> for Read {
    type Response = ReadResponse;
    type ResponseStream = ReceiverStream<Result<ReadResponse, Status>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<ReadRequest>) -> Self::Future {
        let file = self.0.clone();
        Box::pin(async move {
            let ReadRequest { length, pin_id: frame, offset, .. } = request.into_inner();
            let (frames, answer) = tokio::sync::mpsc::channel(READ_AHEAD);
            tokio::spawn(async move {
                for start in (0..u64::from(length)).step_by(frame.max(1) as usize) {
                    let mut data = vec![0; frame as usize];
                    let read = file.read_exact_at(&mut data, offset + start);
                    let frame = read.map(|()| ReadResponse { data }).map_err(Status::from);
                    // Fails when the client is gone.
                    if frames.send(frame).await.is_err() {
                        return;
                    }
                }
            });
            Ok(Response::new(ReceiverStream::new(answer)))
        })
    }
}

impl tonic::server::UnaryService<()> for Empty {
    type Response = ();
    type Future = BoxFuture<Response<()>, Status>;

    fn call(&mut self, _: Request<()>) -> Self::Future {
        Box::pin(async { Ok(Response::new(())) })
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let path = std::env::args_os().nth(1).unwrap_or_default();
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("listening http://{}", listener.local_addr()?);
    let connections = TcpIncoming::from(listener).with_nodelay(Some(true));
    let service = Plain(Arc::new(file));
    tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(connections)
        .await?;
    Ok(())
}
