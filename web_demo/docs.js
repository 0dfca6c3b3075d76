// Shows openapi.json with Swagger UI. No validator: it would send the address of this server to an outside host.

window.SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null });
