//go:build tools

// Helm, by which the tests render and lint the chart. A module of its own: what it needs is newer than what the API server of
// tests/kubernetes is built with. Never compiled; it only keeps the modules in go.mod and go.sum.
package helm

import (
	_ "helm.sh/helm/v4/cmd/helm"
)
