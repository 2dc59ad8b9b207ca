{{/* cluster/otel-collector.yaml for a pod, with one more exporter if traces are forwarded. */}}
{{- define "moiety.collectorConfig" -}}
{{- $forwardTo := .Values.telemetry.collector.forwardTo -}}
receivers:
  otlp:
    protocols:
      grpc:
        endpoint: 0.0.0.0:4317
processors:
  memory_limiter:
    check_interval: 1s
    limit_mib: 400
  batch: {}
exporters:
  debug:
    verbosity: basic
  prometheus:
    endpoint: 0.0.0.0:8889
  {{- with $forwardTo }}
  otlp:
    endpoint: {{ . }}
    tls:
      insecure: {{ hasPrefix "http://" . }}
  {{- end }}
extensions:
  health_check:
    endpoint: 0.0.0.0:13133
service:
  extensions: [health_check]
  pipelines:
    traces:
      receivers: [otlp]
      processors: [memory_limiter, batch]
      exporters: [debug{{ if $forwardTo }}, otlp{{ end }}]
    metrics:
      receivers: [otlp]
      processors: [memory_limiter, batch]
      exporters: [prometheus]
{{- end -}}
