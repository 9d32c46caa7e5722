//! `CancelOperation`: forwarded, but for what others wait for as well. One of several clients that
//! share an execution cancels it for itself alone, which it does by leaving.

use std::sync::Arc;

use bytes::Bytes;
use tonic::Code;

use super::alike::Circle;
use super::{Asked, Call, Proxy, Reply, asked_by_name};
use crate::grpc;
use crate::reapi::google::longrunning::CancelOperationRequest;
use crate::speculation::Engine;

pub async fn call(proxy: Arc<Proxy>, engine: Arc<Engine>, call: Call, mut reply: Reply) {
    let mut call = call;
    let read_name = |request: CancelOperationRequest| request.name;
    let asked = asked_by_name(&engine, &mut call, &mut reply, read_name);
    let (key, name) = match asked.await {
        Some((Asked::About(key), name)) => (key, name),
        Some((Asked::LeftAlone, _)) => return proxy.forward(call, reply, None).await,
        None => return,
    };
    let circle = Circle::of(&call, &key);
    let shared = proxy.joining.executions.named(&circle, &name);
    if shared.is_some_and(|shared| shared.is_wanted_beside(call.peer.id())) {
        // `google.protobuf.Empty`.
        let empty = grpc::framed(&Bytes::new());
        if let Some(reply) = reply.message(empty).await {
            reply.end(Code::Ok, "");
        }
        return;
    }
    proxy.forward(call, reply, None).await;
}
