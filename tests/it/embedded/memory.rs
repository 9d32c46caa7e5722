//! Memory does not grow with what passes. `scripts/soak-embedded` shows it with more.

use primed::cas::Digest;
use primed::reapi::google::bytestream::byte_stream_client::ByteStreamClient;
use primed::reapi::google::bytestream::{ReadRequest, WriteRequest};

use super::{cas, keep, missing};
use crate::client::connect;
use crate::support::{Primed, scratch};

/// How many MiB of blobs, unless `PRIMED_TEST_MIB` says otherwise.
const MIB: usize = 64;
/// More than primed may need for them, in bytes. A build for debugging takes more than a real one.
const MEMORY: u64 = 128 << 20;

/// Of `size` bytes, and like no other.
fn content(number: usize, size: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(number as u64);
    let mut content = vec![0; size];
    random.fill(&mut content);
    content
}

#[tokio::test]
async fn memory_does_not_grow_with_the_blobs_that_pass() {
    let mib = std::env::var("PRIMED_TEST_MIB").ok();
    let mib = mib.map_or(MIB, |mib| mib.parse().unwrap());
    let scratch = scratch();
    let primed = Primed::embedded(scratch.path(), &[]);
    let mut cas = cas(&primed);
    let mut streams = ByteStreamClient::new(connect(&primed.socket()));
    let (mut passed, mut number, mut digests) = (0, 0, Vec::new());
    let mut early = 0;
    while passed < mib << 20 {
        // One large blob, and as much in small ones.
        let large = content(number, 8 << 20);
        let digest = Digest::of(&large);
        let name = format!("uploads/{number}/blobs/{digest}");
        let last = large.chunks(256 << 10).count() - 1;
        let messages = large
            .chunks(256 << 10)
            .enumerate()
            .map(|(at, piece)| WriteRequest {
                resource_name: name.clone(),
                write_offset: (at * (256 << 10)) as i64,
                finish_write: at == last,
                data: piece.to_vec().into(),
            });
        let messages: Vec<WriteRequest> = messages.collect();
        streams.write(tokio_stream::iter(messages)).await.unwrap();
        digests.push(digest);
        for _ in 0..64 {
            number += 1;
            digests.push(keep(&mut cas, content(number, 128 << 10)).await.unwrap());
        }
        number += 1;
        passed += 16 << 20;
        if early == 0 && passed >= (mib << 20) / 4 {
            early = primed.daemon.peak_memory();
        }
    }
    assert_eq!(missing(&mut cas, &digests).await, []);
    for digest in &digests {
        let request = ReadRequest {
            resource_name: format!("blobs/{digest}"),
            ..ReadRequest::default()
        };
        let mut pieces = streams.read(request).await.unwrap().into_inner();
        let mut size = 0;
        while let Some(piece) = pieces.message().await.unwrap() {
            size += piece.data.len() as u64;
        }
        assert_eq!(size, digest.size());
    }
    let peak = primed.daemon.peak_memory();
    eprintln!(
        "{mib} MiB in {} blobs, written and read back: peak RSS {} MiB after a quarter of the \
         writes, {} MiB in the end",
        digests.len(),
        early >> 20,
        peak >> 20
    );
    assert!(peak < MEMORY, "{peak} bytes");
}
