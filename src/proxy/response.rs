//! Responses that primed gives itself.

use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use tonic::Code;

use super::body::ResponseBody;
use super::grpc::trailers;

const APPLICATION_GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// A response without a body: "Trailers-Only" in gRPC's words.
pub fn ended(code: Code, message: &str) -> Response<ResponseBody> {
    let mut response = started(ResponseBody::empty());
    response.headers_mut().extend(trailers(code, message));
    response
}

/// A response whose status will come in its trailers.
pub fn started(body: ResponseBody) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::OK;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, APPLICATION_GRPC);
    response
}
