//go:build tools

// The container runtime of the nodes that `cargo xtask cluster` makes. This file is never compiled: it only keeps the
// modules of the commands in go.mod and go.sum, so that `go build` of them works offline once cached.
package containerd

import (
	_ "github.com/containerd/containerd/v2/cmd/containerd"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"
	_ "github.com/containerd/containerd/v2/cmd/ctr"
)
