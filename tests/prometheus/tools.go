//go:build tools

// Prometheus, by which the tests evaluate the alert rules and the dashboard. A module of its own: what it needs is newer than what the
// API server of tests/kubernetes is built with. go.mod names Prometheus alone, whose own go.mod has the rest; `go mod tidy` would list
// it here, and fetch the libraries of every cloud that the build leaves out. After a change of version:
// `go build -mod=mod -tags remove_all_sd -o /dev/null` with both packages completes go.sum. Never compiled.
package prometheus

import (
	_ "github.com/prometheus/prometheus/cmd/prometheus"
	_ "github.com/prometheus/prometheus/cmd/promtool"
)
