"""Pages that explain a trained model: report.html, and live.html, in which it generates."""
