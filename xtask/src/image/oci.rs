//! An image with one layer as an OCI layout in a tar archive, which also has the `manifest.json` of older Docker versions. Pure, and
//! the same bytes for the same files: no times, users or orders of the machine it is made on. Called by [`super`]; the tests of
//! `tests/tests/image.rs` read what it writes.

use std::io::Write as _;

use anyhow::Result;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// A file of the layer.
pub(crate) struct File {
    /// Below the root, without a slash in front.
    pub(crate) path: String,
    /// Permissions.
    pub(crate) mode: u32,
    /// Content.
    pub(crate) bytes: Vec<u8>,
}

/// What an image is called.
pub(crate) struct About<'a> {
    pub(crate) name: &'a str,
    pub(crate) version: &'a str,
    /// As OCI has it.
    pub(crate) arch: &'a str,
}

/// The finished archive.
pub(crate) struct Image {
    pub(crate) archive: Vec<u8>,
    /// Of the manifest: what `image@sha256:…` names.
    pub(crate) digest: String,
}

/// Content with its digest.
struct Blob {
    digest: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        let digest = digest(&bytes);
        Self { digest, bytes }
    }

    fn path(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": self.digest, "size": self.bytes.len()})
    }
}

/// Packs an image.
pub(crate) fn image(about: &About<'_>, files: &[File]) -> Result<Image> {
    let layer = tar(files)?;
    let diff_id = digest(&layer);
    let layer = Blob::new(gzip(&layer)?);
    let config = Blob::new(serde_json::to_vec(&json!({
        "architecture": about.arch,
        "os": "linux",
        "config": {
            "User": "0:0",
            "Entrypoint": ["/proxy-agent"],
            "Env": ["PATH=/"],
            "Labels": {
                "org.opencontainers.image.title": "proxy-agent",
                "org.opencontainers.image.version": about.version,
                "org.opencontainers.image.licenses": "(Apache-2.0 OR MIT) AND (MIT OR GPL-2.0)",
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    }))?);
    let manifest = Blob::new(serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
        "layers": [layer.descriptor("application/vnd.oci.image.layer.v1.tar+gzip")],
    }))?);
    let tag = format!("{}:{}", about.name, about.version);
    let mut entry = manifest.descriptor("application/vnd.oci.image.manifest.v1+json");
    entry["platform"] = json!({"architecture": about.arch, "os": "linux"});
    // containerd takes the first for the image's whole name, OCI's tools the second for the tag.
    entry["annotations"] = json!({
        "io.containerd.image.name": format!("docker.io/{tag}"),
        "org.opencontainers.image.ref.name": about.version,
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    });
    let docker = json!([{"Config": config.path(), "RepoTags": [tag], "Layers": [layer.path()]}]);
    let digest = manifest.digest.clone();
    let mut members = vec![
        member(
            "oci-layout",
            serde_json::to_vec(&json!({"imageLayoutVersion": "1.0.0"}))?,
        ),
        member("index.json", serde_json::to_vec(&index)?),
        member("manifest.json", serde_json::to_vec(&docker)?),
    ];
    for blob in [config, layer, manifest] {
        members.push(member(&blob.path(), blob.bytes));
    }
    Ok(Image {
        archive: tar(&members)?,
        digest,
    })
}

fn member(path: &str, bytes: Vec<u8>) -> File {
    File {
        path: path.to_owned(),
        mode: 0o644,
        bytes,
    }
}

fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn tar(files: &[File]) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for file in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(file.bytes.len() as u64);
        header.set_mode(file.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        archive.append_data(&mut header, &file.path, file.bytes.as_slice())?;
    }
    Ok(archive.into_inner()?)
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_make_the_same_image() {
        let about = About {
            name: "a/b",
            version: "1",
            arch: "amd64",
        };
        let files = |content: &str| [member("x", content.as_bytes().to_vec())];
        let first = image(&about, &files("one")).unwrap();
        let second = image(&about, &files("one")).unwrap();
        assert_eq!(first.archive, second.archive);
        assert_eq!(first.digest, second.digest);
        assert_ne!(first.digest, image(&about, &files("two")).unwrap().digest);
    }
}
