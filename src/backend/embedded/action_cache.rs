//! The action cache as a service.

use std::sync::Arc;

use bytes::Bytes;
use tonic::{Request, Response, Status, async_trait};

use super::blobs::Blobs;
use super::requests::{MAX_BATCH, on_disk, only_digest};
use super::results::Results;
use crate::digest::DigestFunction;
use crate::reapi::action_cache_server::ActionCache;
use crate::reapi::{self, ActionResult, GetActionResultRequest, UpdateActionResultRequest};

/// The service.
pub(super) struct ActionCacheService {
    pub blobs: Arc<Blobs>,
    pub results: Arc<Results>,
}

#[async_trait]
impl ActionCache for ActionCacheService {
    async fn get_action_result(
        &self,
        request: Request<GetActionResultRequest>,
    ) -> Result<Response<ActionResult>, Status> {
        let request = request.into_inner();
        let action = only_digest(request.digest_function, request.action_digest.as_ref())?;
        let found = self.results.get(&request.instance_name, action).await;
        let Some(result) = found else {
            return Err(Status::not_found(format!(
                "the action cache has no result of {action}"
            )));
        };
        let wants_none = !request.inline_stdout
            && !request.inline_stderr
            && request.inline_output_files.is_empty();
        if wants_none {
            return Ok(Response::new(result));
        }
        let blobs = self.blobs.clone();
        let inline = move || Ok(inlined(&blobs, action.function(), &request, result));
        on_disk("inline outputs", inline).await.map(Response::new)
    }

    async fn update_action_result(
        &self,
        request: Request<UpdateActionResultRequest>,
    ) -> Result<Response<ActionResult>, Status> {
        let request = request.into_inner();
        let action = only_digest(request.digest_function, request.action_digest.as_ref())?;
        let Some(result) = request.action_result else {
            return Err(Status::invalid_argument("the request has no action result"));
        };
        let results = self.results.clone();
        let result = on_disk("result check", move || {
            let checked = results.check(&result, action.function());
            checked.map_err(|error| Status::failed_precondition(error.to_string()))?;
            Ok(result)
        });
        let result = result.await?;
        self.results
            .put(&request.instance_name, action, &result)
            .await?;
        Ok(Response::new(result))
    }
}

/// `result` with the contents in it that `request` asks for, as far as there is room in an answer.
fn inlined(
    blobs: &Blobs,
    function: DigestFunction,
    request: &GetActionResultRequest,
    mut result: ActionResult,
) -> ActionResult {
    let mut room = MAX_BATCH;
    let mut inline = |digest: Option<&reapi::Digest>, content: &mut Bytes| {
        let Ok(digest) = function.read(digest) else {
            return;
        };
        if !content.is_empty() || digest.size() > room {
            return;
        }
        // What cannot be read need not be in the answer; the client will ask for it.
        if let Ok(blob) = blobs.read_now(digest) {
            room -= digest.size();
            *content = blob;
        }
    };
    if request.inline_stdout {
        inline(result.stdout_digest.as_ref(), &mut result.stdout_raw);
    }
    if request.inline_stderr {
        inline(result.stderr_digest.as_ref(), &mut result.stderr_raw);
    }
    for file in &mut result.output_files {
        if request.inline_output_files.contains(&file.path) {
            inline(file.digest.as_ref(), &mut file.contents);
        }
    }
    result
}
