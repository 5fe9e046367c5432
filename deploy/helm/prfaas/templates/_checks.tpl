{{/*
What one value means for another; values.schema.json checks each value by itself. A failure names the values.
*/}}
{{- define "prfaas.check" -}}
{{- if not (regexMatch "^[a-z]" (include "prfaas.fullname" .)) }}
{{- fail (printf "fullnameOverride: is needed with a release named %s: names of Services begin with a letter" .Release.Name) }}
{{- end }}
{{- $config := include "prfaas.config" . | fromYaml }}
{{- range $role := list "prefill" "decode" }}
{{- $group := index $.Values.workerGroups $role }}
{{- $of := dict "root" $ "config" $config "role" $role }}
{{- $pool := index $config $role }}
{{- $replicas := int (include "prfaas.replicas" $of) }}
{{- $min := int (include "prfaas.minReplicas" $of) }}
{{- $max := int (include "prfaas.maxReplicas" $of) }}
{{- if not (kindIs "invalid" $pool.max_replicas) }}
{{- $most := int (include "prfaas.podsFor" (dict "root" $ "role" $role "count" $pool.max_replicas)) }}
{{- if lt $max $most }}
{{- fail (printf "workerGroups.%s.maxReplicas: must be at least %d, the pods that config.%s.max_replicas (%d) needs at %d workers a pod" $role $most $role (int $pool.max_replicas) (int $group.workersPerPod)) }}
{{- end }}
{{- if and (gt $most $replicas) (not $.Values.ray.autoscaler.enabled) }}
{{- fail (printf "config.%s.max_replicas: needs ray.autoscaler.enabled, or no pod ever comes for the workers beyond config.%s.count (%d)" $role $role (int $pool.count)) }}
{{- end }}
{{- end }}
{{- if or (gt $min $replicas) (lt $max $replicas) }}
{{- fail (printf "workerGroups.%s: minReplicas (%d) and maxReplicas (%d) must enclose the %d pods that config.%s.count needs at %d workers a pod" $role $min $max $replicas $role (int $group.workersPerPod)) }}
{{- end }}
{{- if and (ne $min $max) (not $.Values.ray.autoscaler.enabled) }}
{{- fail (printf "workerGroups.%s: minReplicas and maxReplicas differ, which means something only with ray.autoscaler.enabled" $role) }}
{{- end }}
{{- $placed := false }}{{ range $_, $amount := (index $config $role).resources }}{{ if gt (float64 $amount) 0.0 }}{{ $placed = true }}{{ end }}{{ end }}
{{- if and (gt $replicas 0) (not $placed) }}
{{- fail (printf "config.%s.resources: must hold an amount above 0, for instance {%s: 1}: it is what keeps these workers in the pods of workerGroups.%s" $role $role $role) }}
{{- end }}
{{- end }}
{{- if and .Values.config.join (not .Values.tls.existingSecret) (ne (dig "tls" "mode" "auto" $config) "off") }}
{{- fail "tls.existingSecret: is needed with config.join: a gateway elsewhere takes only certificates of its own authority (config.tls.mode: off does without any)" }}
{{- end }}
{{- if and .Values.config.join (gt (int $config.decode.count) 0) }}
{{- fail "config.decode.count: must be 0 with config.join: K/V goes to the decode workers of the gateway's cluster" }}
{{- end }}
{{- if and .Values.config.join .Values.apiKeys.existingSecret }}
{{- fail "apiKeys.existingSecret: means nothing with config.join: a cluster that joins has no door" }}
{{- end }}
{{- if and .Values.registry.service.enabled (not (dig "registry" "port" 0 $config)) }}
{{- fail "config.registry.port: is needed with registry.service.enabled: other clusters must know the port" }}
{{- end }}
{{- if and .Values.registry.service.enabled (not .Values.tls.existingSecret) (ne (dig "tls" "mode" "auto" $config) "off") }}
{{- fail "tls.existingSecret: is needed with registry.service.enabled: other clusters do not know certificates that are made for one run (config.tls.mode: off does without any)" }}
{{- end }}
{{- if and (eq .Values.models.type "pvc") (not .Values.models.pvc.existingClaim) (not .Values.models.pvc.size) }}
{{- fail "models.pvc.size: is needed unless models.pvc.existingClaim is given" }}
{{- end }}
{{- end }}
