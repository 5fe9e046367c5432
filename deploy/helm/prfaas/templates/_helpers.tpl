{{/*
What several manifests must agree on. In each: `.` is the root context unless the comment says otherwise.
*/}}

{{- define "prfaas.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Name of the RayCluster and the beginning of all others. KubeRay adds "-head-svc" and pod suffixes: 40 leaves room. */}}
{{- define "prfaas.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "prfaas.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "prfaas.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "prfaas.selectorLabels" -}}
app.kubernetes.io/name: {{ include "prfaas.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "prfaas.labels" -}}
{{ include "prfaas.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* "launcher" in a cluster that joins gateways elsewhere: it has no door. */}}
{{- define "prfaas.component" -}}
{{- if .Values.config.join }}launcher{{ else }}gateway{{ end }}
{{- end }}

{{- define "prfaas.image" -}}
{{- $name := printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- with .Values.image.registry }}{{ . }}/{{ end }}{{ $name }}
{{- end }}

{{- define "prfaas.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "prfaas.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* host:port of Ray's GCS, under the name that KubeRay gives the head's Service. */}}
{{- define "prfaas.rayAddress" -}}
{{- printf "%s-head-svc.%s.svc.%s:6379" (include "prfaas.fullname" .) .Release.Namespace .Values.clusterDomain }}
{{- end }}

{{/* The Secret with Ray's token: the operator makes one, named like the RayCluster, unless one is given. */}}
{{- define "prfaas.rayTokenSecret" -}}
{{- .Values.ray.auth.existingSecret | default (include "prfaas.fullname" .) }}
{{- end }}

{{/*
The YAML of `prfaas serve`: `config`, over what a pod needs and the service does not default to. Whatever `config` says
wins. Sections of a gateway are left out of a cluster that joins: `prfaas serve` refuses them there.
*/}}
{{- define "prfaas.config" -}}
{{- $models := .Values.models.mountPath }}
{{- $needed := dict
      "model_cache_dir" (printf "%s/prfaas" $models)
      "ray" (dict "address" "auto")
      "control" (dict "port" 9200 "last_port" 9219)
      "kv_transfer" (dict "port" 9300 "last_port" 9319)
}}
{{- if not .Values.config.join }}
{{- $_ := set $needed "http" (dict "host" "0.0.0.0" "port" 8000) }}
{{- $_ := set $needed "grpc" (dict "host" "0.0.0.0" "port" 9000) }}
{{- $_ := set $needed "router" (dict "costs_file" (printf "%s/prfaas/%s-costs.json" $models (include "prfaas.fullname" .))) }}
{{- end }}
{{- if .Values.tls.existingSecret }}
{{- $files := .Values.tls.mountPath }}
{{- $_ := set $needed "tls" (dict
      "mode" "on"
      "ca_file" (printf "%s/%s" $files .Values.tls.caKey)
      "cert_file" (printf "%s/%s" $files .Values.tls.certKey)
      "key_file" (printf "%s/%s" $files .Values.tls.keyKey)) }}
{{- end }}
{{- if .Values.apiKeys.existingSecret }}
{{- $_ := set $needed "api_keys_file" (printf "/etc/prfaas/api-keys/%s" .Values.apiKeys.key) }}
{{- end }}
{{- range $role := list "prefill" "decode" }}
{{- $_ := set $needed $role (dict "count" 1 "num_cpus" 1 "num_gpus" 0 "resources" (dict $role 1)) }}
{{- end }}
{{- toYaml (mergeOverwrite $needed (deepCopy .Values.config)) }}
{{- end }}

{{/* Secrets and model files as the processes expect them, for every pod that runs our code. */}}
{{- define "prfaas.env" -}}
- name: HF_HOME
  value: {{ .Values.models.mountPath }}/huggingface
{{- with .Values.huggingFace.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.huggingFace.key }}
{{- end }}
{{- end }}

{{/*
Ray's token, in the pods that the operator does not know. In its own pods it sets both by itself (authOptions).
Without the mode Ray 2.60 would ask for a token file.
*/}}
{{- define "prfaas.rayAuthEnv" -}}
- name: RAY_AUTH_MODE
  value: {{ .Values.ray.auth.mode }}
{{- if eq .Values.ray.auth.mode "token" }}
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "prfaas.rayTokenSecret" . }}
      key: auth_token
{{- end }}
{{- end }}

{{- define "prfaas.volumeMounts" -}}
- name: models
  mountPath: {{ .Values.models.mountPath }}
{{- if .Values.tls.existingSecret }}
- name: tls
  mountPath: {{ .Values.tls.mountPath }}
  readOnly: true
{{- end }}
{{- end }}

{{- define "prfaas.volumes" -}}
- name: models
{{- if eq .Values.models.type "pvc" }}
  persistentVolumeClaim:
    claimName: {{ .Values.models.pvc.existingClaim | default (printf "%s-models" (include "prfaas.fullname" .)) }}
{{- else if eq .Values.models.type "hostPath" }}
  hostPath:
    path: {{ .Values.models.hostPath.path }}
    type: {{ .Values.models.hostPath.type }}
{{- else }}
  emptyDir:
    {{- with .Values.models.emptyDir.sizeLimit }}
    sizeLimit: {{ . }}
    {{- else }}
    {}
    {{- end }}
{{- end }}
{{- with .Values.tls.existingSecret }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440  # the group is podSecurityContext.fsGroup
{{- end }}
{{- end }}

{{/* Where pods go. `.`: (dict "root" $ "pod" values-of-the-group "selector" labels-of-its-pods) */}}
{{- define "prfaas.scheduling" -}}
{{- with .pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pod.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  - {{ toYaml . | nindent 4 | trim }}
    {{- if not .labelSelector }}
    labelSelector:
      matchLabels:
        {{- $.selector | nindent 8 }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Pods that hold so many workers of a pool. `.`: (dict "root" $ "role" role "count" count) */}}
{{- define "prfaas.podsFor" -}}
{{- $perPod := int (index .root.Values.workerGroups .role).workersPerPod }}
{{- div (add (int .count) (sub $perPod 1)) $perPod }}
{{- end }}

{{/* Pods of a worker group: as many as hold `count` workers. `.`: (dict "root" $ "config" config "role" role) */}}
{{- define "prfaas.replicas" -}}
{{- include "prfaas.podsFor" (dict "root" .root "role" .role "count" (index .config .role).count) }}
{{- end }}

{{/*
Fewest and most pods of a worker group: what its values say, else what the pool's min_replicas and max_replicas need.
`.`: as of prfaas.replicas
*/}}
{{- define "prfaas.minReplicas" -}}
{{- $group := index .root.Values.workerGroups .role }}
{{- $pool := index .config .role }}
{{- $count := $pool.count }}{{ if not (kindIs "invalid" $pool.min_replicas) }}{{ $count = $pool.min_replicas }}{{ end }}
{{- if kindIs "invalid" $group.minReplicas }}
{{- include "prfaas.podsFor" (dict "root" .root "role" .role "count" $count) }}
{{- else }}
{{- int $group.minReplicas }}
{{- end }}
{{- end }}
{{- define "prfaas.maxReplicas" -}}
{{- $group := index .root.Values.workerGroups .role }}
{{- $pool := index .config .role }}
{{- $count := $pool.count }}{{ if not (kindIs "invalid" $pool.max_replicas) }}{{ $count = $pool.max_replicas }}{{ end }}
{{- if kindIs "invalid" $group.maxReplicas }}
{{- include "prfaas.podsFor" (dict "root" .root "role" .role "count" $count) }}
{{- else }}
{{- int $group.maxReplicas }}
{{- end }}
{{- end }}

{{/* Limits and requests of a worker's container: what is given, and the devices that the workers in it need. */}}
{{- define "prfaas.workerResources" -}}
{{- $group := index .root.Values.workerGroups .role }}
{{- $resources := deepCopy $group.resources }}
{{- $devices := dict }}
{{- $gpus := int (ceil (mulf (float64 (index .config .role).num_gpus) (float64 $group.workersPerPod))) }}
{{- if $gpus }}{{ $_ := set $devices $group.gpuResourceName $gpus }}{{ end }}
{{- if $group.rdma.enabled }}{{ $_ := set $devices $group.rdma.resourceName (int $group.rdma.count) }}{{ end }}
{{- if $devices }}
{{- $_ := set $resources "limits" (merge $devices (default dict $resources.limits)) }}
{{- $_ := set $resources "requests" (merge (deepCopy $devices) (default dict $resources.requests)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/*
What `ray start` is told in a worker group: the Ray resources of its workers, so that Ray, KubeRay's autoscaler and the
placement in `config` count alike. Custom resources are quoted as KubeRay and Ray's autoscaler read them.
*/}}
{{- define "prfaas.workerRayStartParams" -}}
{{- $group := index .root.Values.workerGroups .role }}
{{- $pool := index .config .role }}
{{- $perPod := float64 $group.workersPerPod }}
{{- $custom := dict }}
{{- range $name, $amount := $pool.resources }}
{{- $_ := set $custom $name (int (ceil (mulf (float64 $amount) $perPod))) }}
{{- end }}
{{- $params := dict
      "num-cpus" (printf "%d" (int (ceil (mulf (float64 $pool.num_cpus) $perPod))))
      "num-gpus" (printf "%d" (int (ceil (mulf (float64 $pool.num_gpus) $perPod))))
      "object-store-memory" (printf "%d" (int .root.Values.ray.objectStoreBytes))
      "metrics-export-port" "8080"
}}
{{- if $custom }}{{ $_ := set $params "resources" (toJson (toJson $custom)) }}{{ end }}
{{- toYaml (mergeOverwrite $params (deepCopy $group.rayStartParams)) }}
{{- end }}
