//! Contents within a result, for those who ask for them: it saves a client a call.

use std::sync::Arc;

use bytes::Bytes;

use crate::backend::embedded::blobs::Blobs;
use crate::digest::{Digest, DigestFunction};
use crate::reapi::{self, ExecuteRequest, ExecuteResponse};

/// How much content one response may hold, in bytes: a message should stay below 4 MiB.
const MOST: u64 = 1024 * 1024;

/// What is to be within the result.
#[derive(Clone, Debug, Default)]
pub struct Inlined {
    function: DigestFunction,
    stdout: bool,
    stderr: bool,
    output_files: Vec<String>,
}

impl Inlined {
    /// What `request` asks for; its digests are of `function`.
    pub fn of(request: &ExecuteRequest, function: DigestFunction) -> Self {
        Inlined {
            function,
            stdout: request.inline_stdout,
            stderr: request.inline_stderr,
            output_files: request.inline_output_files.clone(),
        }
    }

    /// The response with as much of that as fits into it.
    pub async fn grant(&self, blobs: &Arc<Blobs>, response: &ExecuteResponse) -> ExecuteResponse {
        let mut response = response.clone();
        let Some(result) = &mut response.result else {
            return response;
        };
        let mut room = MOST;
        if self.stdout {
            result.stdout_raw = self.content(blobs, &result.stdout_digest, &mut room).await;
        }
        if self.stderr {
            result.stderr_raw = self.content(blobs, &result.stderr_digest, &mut room).await;
        }
        for file in &mut result.output_files {
            if self.output_files.contains(&file.path) {
                file.contents = self.content(blobs, &file.digest, &mut room).await;
            }
        }
        response
    }

    /// The content of `digest`; empty if there is none, or no room for it.
    async fn content(
        &self,
        blobs: &Arc<Blobs>,
        digest: &Option<reapi::Digest>,
        room: &mut u64,
    ) -> Bytes {
        let digest = digest
            .as_ref()
            .and_then(|one| self.function.read(Some(one)).ok());
        let Some(digest) = digest.filter(|digest: &Digest| digest.size() <= *room) else {
            return Bytes::new();
        };
        *room -= digest.size();
        blobs.read(digest).await.unwrap_or_default()
    }
}
