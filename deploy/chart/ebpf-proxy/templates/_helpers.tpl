{{- define "ebpf-proxy.labels" -}}
app.kubernetes.io/name: {{ .Values.nameOverride }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "ebpf-proxy.serviceAccount" -}}
{{- .Values.serviceAccount.name | default .Values.nameOverride }}
{{- end }}

{{/* Arguments of `proxy-agent run`: only what differs from the agent's own defaults. */}}
{{- define "ebpf-proxy.args" -}}
{{- $values := .Values }}
{{- $gates := list }}
{{- range $gate, $on := $values.featureGates }}{{ $gates = append $gates (printf "%s=%v" $gate $on) }}{{ end }}
{{- $health := printf "%s:%d" $values.health.address (int64 $values.health.port) }}
{{- $flags := list
  (list "detect-local-mode" $values.pods.detectLocalMode)
  (list "cluster-cidr" $values.pods.clusterCIDR)
  (list "pod-bridge-interface" $values.pods.bridgeInterface)
  (list "pod-interface-name-prefix" $values.pods.interfaceNamePrefix)
  (list "nodeport-addresses" (join "," $values.nodePorts.addresses))
  (list "localhost-nodeports" (ternary "" "false" $values.nodePorts.localhost))
  (list "feature-gates" (join "," $gates))
  (list "cgroup" "/host/cgroup")
  (list "socket-lb" $values.datapath.socketLB)
  (list "attach" $values.datapath.attach)
  (list "interfaces" $values.datapath.interfaces)
  (list "exclude-interfaces" $values.datapath.excludeInterfaces)
  (list "xdp-interfaces" $values.datapath.xdp.interfaces)
  (list "xdp-mode" $values.datapath.xdp.mode)
  (list "bpf-log-level" $values.datapath.bpfLogLevel)
  (list "min-sync-period" $values.sync.minPeriod)
  (list "sync-period" $values.sync.period)
  (list "conntrack-tcp-timeout-established" $values.conntrack.tcpTimeoutEstablished)
  (list "conntrack-tcp-timeout-close-wait" $values.conntrack.tcpTimeoutCloseWait)
  (list "conntrack-udp-timeout" $values.conntrack.udpTimeout)
  (list "conntrack-udp-timeout-stream" $values.conntrack.udpTimeoutStream)
  (list "healthz-bind-address" (ternary "" $health (eq $health "0.0.0.0:10256")))
}}
{{- range $flags }}{{ if index . 1 }}
- {{ printf "--%s=%s" (index . 0) (index . 1) | quote }}
{{- end }}{{ end }}
{{- if ne $values.metrics.bindAddress "127.0.0.1:10249" }}
- {{ printf "--metrics-bind-address=%s" $values.metrics.bindAddress | quote }}
{{- end }}
{{- range $map := list "frontends" "backends" "rewrites" "services" }}
{{- with index $values.datapath.capacities $map }}
- {{ printf "--%s-capacity=%d" $map (int64 .) | quote }}
{{- end }}{{ end }}
{{- if $values.masqueradeAll }}
- --masquerade-all
{{- end }}
{{- if $values.bindAddressHardFail }}
- --bind-address-hard-fail
{{- end }}
{{- range $values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{/* The port where Prometheus finds the agent; a mistake that would only show as missing data is told here. */}}
{{- define "ebpf-proxy.metricsPort" -}}
{{- $address := .Values.metrics.bindAddress }}
{{- if or (not $address) (regexMatch "^(127\\.|\\[::1\\]|localhost:)" $address) }}
{{- fail (printf "monitoring.podMonitor: Prometheus cannot reach metrics.bindAddress %q: set it to an address of the node, for example 0.0.0.0:10249" $address) }}
{{- end }}
{{- regexFind "[0-9]+$" $address }}
{{- end }}
