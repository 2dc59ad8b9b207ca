{{/* The config file that `serve deploy` would take: the application of cluster/serve.yaml. */}}
{{- define "moiety.serveConfig" -}}
{{- $given := dict "model" (include "moiety.modelPath" .) -}}
proxy_location: Disabled
logging_config:
  encoding: JSON
  log_level: INFO
  enable_access_log: false
applications:
  - name: moiety
    import_path: moiety.deploy.app:build
    args:
      {{- toYaml (merge $given .Values.app) | nindent 6 }}
{{- end -}}

{{/* One Ray pod. Takes `root`, `node` (head or worker), `settings` (resources, nodeSelector, tolerations). */}}
{{- define "moiety.rayPod" -}}
{{- $root := .root -}}
{{- $model := $root.Values.model -}}
metadata:
  labels:
    {{- include "moiety.selector" $root | nindent 4 }}
    app.kubernetes.io/component: ray-{{ .node }}
spec:
  # Requests that run in this pod get drain_s to finish: Ray and Kubernetes must wait longer than that.
  {{- $drain := int (ceil $root.Values.app.drain_s) }}
  terminationGracePeriodSeconds: {{ add $drain 30 }}
  enableServiceLinks: false # else the application would read a Service's injected MOIETY_… variables as settings
  {{- if eq .node "worker" }}
  automountServiceAccountToken: false
  {{- end }}
  securityContext:
    {{- include "moiety.podSecurity" $root | nindent 4 }}
    runAsUser: 1000
    fsGroup: 1000
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .settings.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .settings.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-{{ .node }}
      image: "{{ required "image.repository is required: no image is published" $root.Values.image.repository }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}"
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext: {{- include "moiety.containerSecurity" $root | nindent 8 }}
      resources: {{- toYaml .settings.resources | nindent 8 }}
      env:
        {{- include "moiety.registryEnv" $root | nindent 8 }}
        - name: RAY_USAGE_STATS_ENABLED
          value: "0"
        - name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S # from SIGTERM on
          value: {{ add $drain 15 | quote }}
        {{- with include "moiety.otlpEndpoint" $root }}
        - name: OTEL_EXPORTER_OTLP_ENDPOINT
          value: {{ . }}
        {{- end }}
        {{- with $root.Values.ray.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if eq .node "head" }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
      {{- else }}
      ports:
        - {name: grpc, containerPort: {{ $root.Values.app.gateway.port }}}
        {{- if $root.Values.app.gateway.http }}
        - {name: http, containerPort: {{ $root.Values.app.gateway.http_port }}}
        {{- end }}
      # Ready means that this pod's gateway answers. A worker without a gateway computes for the others, outside the Service.
      readinessProbe:
        grpc: {port: {{ $root.Values.app.gateway.port }}}
        periodSeconds: 2
        failureThreshold: 2
      {{- end }}
      volumeMounts:
        - {name: model, mountPath: /models, readOnly: true}
  volumes:
    - name: model
      {{- if and $model.existingClaim $model.hostPath }}
      {{- fail "model.existingClaim and model.hostPath are both set: give one of the two" }}
      {{- else if $model.existingClaim }}
      persistentVolumeClaim: {claimName: {{ $model.existingClaim }}, readOnly: true}
      {{- else }}
      hostPath: {type: Directory, path: {{ required "model.existingClaim or model.hostPath is required" $model.hostPath }}}
      {{- end }}
{{- end -}}
