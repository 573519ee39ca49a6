{{- define "terway.labels" -}}
app.kubernetes.io/name: terway
app.kubernetes.io/part-of: terway
{{- end -}}
{{/* A file of the kustomize folders, with labels, in the release's namespace. */}}
{{- define "terway.file" -}}
{{- $labels := printf "metadata:\n  labels:\n%s" (include "terway.labels" .root | indent 4) -}}
{{- $text := .root.Files.Get .path | replace "namespace: kube-system" (printf "namespace: %s" .root.Release.Namespace) -}}
{{- regexReplaceAll "(?m)^metadata:" $text $labels -}}
{{- end -}}
{{- define "terway.image" -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- define "terway.listen" -}}
{{- if .Values.monitoring.enabled }}{{ .Values.monitoring.listen }}{{ else }}{{ .Values.listen }}{{ end -}}
{{- end -}}
{{- define "terway.port" -}}
{{- include "terway.listen" . | default "127.0.0.1:19099" | splitList ":" | last -}}
{{- end -}}
