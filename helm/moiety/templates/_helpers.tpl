{{/* Prefix of every object's name, short enough for KubeRay, which appends to a RayService's name. */}}
{{- define "moiety.fullname" -}}
{{- $base := ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) -}}
{{- $base | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "moiety.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "moiety.labels" -}}
{{ include "moiety.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Path of the checkpoint inside the pods. */}}
{{- define "moiety.modelPath" -}}
{{- list "/models" .Values.model.folder | compact | join "/" -}}
{{- end -}}

{{/* Endpoint for spans and metrics; empty if nothing collects them. */}}
{{- define "moiety.otlpEndpoint" -}}
{{- if .Values.telemetry.endpoint -}}
{{ .Values.telemetry.endpoint }}
{{- else if .Values.telemetry.collector.enabled -}}
http://{{ include "moiety.fullname" . }}-collector:4317
{{- end -}}
{{- end -}}

{{/* The registry's URL, as environment variables, so that a password stays in its Secret. */}}
{{- define "moiety.registryEnv" -}}
{{- $redis := .Values.redis -}}
{{- if $redis.enabled -}}
{{- if $redis.existingSecret.name -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef: {{ toJson $redis.existingSecret }}
- name: MOIETY_REGISTRY
  value: redis://:$(REDIS_PASSWORD)@{{ include "moiety.fullname" . }}-redis:6379/0
{{- else -}}
- name: MOIETY_REGISTRY
  value: redis://{{ include "moiety.fullname" . }}-redis:6379/0
{{- end -}}
{{- else if $redis.external.existingSecret.name -}}
- name: MOIETY_REGISTRY
  valueFrom:
    secretKeyRef: {{ toJson $redis.external.existingSecret }}
{{- else -}}
- name: MOIETY_REGISTRY
  value: {{ required "redis.enabled is false: set redis.external.url or redis.external.existingSecret.name" $redis.external.url }}
{{- end -}}
{{- end -}}

{{- define "moiety.podSecurity" -}}
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "moiety.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end -}}
