from django.urls import path
from djpaystack.webhooks.views import PaystackWebhookView

from bench.django_app import views

urlpatterns = [
    path("api/v1/payments", views.Payments.as_view()),
    path("api/v1/payments/<uuid:pk>", views.PaymentDetail.as_view()),
    path("api/v1/webhooks/paystack", PaystackWebhookView.as_view()),
    path("readyz", views.readyz),
]
